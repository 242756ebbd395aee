"""Which student token a teacher's token begins, and what the student's tokenizer writes side by side."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diglot.objectives.base import Encode
from diglot.vocabulary import Vocabulary
from diglot.vocabulary.maps import first_tokens, greedy_tokens

Ints = NDArray[np.int64]
_LONGER = 64  # student tokens that begin with the rest of a teacher token, at most so many, the shortest first
_RUN_PAST = 8  # teacher tokens that run past the end of a student token, at most so many
_MEMBERS = 8  # of a cell, at most so many are tried before it is given up as not canonical


class CellMap:
    """Cells of student tokens: a token and those longer ones that the teacher begins with the same token.

    A teacher token says which student token comes next, the first one of its text. It does not say so for a student
    token that the teacher writes in several: that one is in the cell of what the teacher's first piece begins.
    """

    def __init__(self, student: Vocabulary, teacher: Vocabulary, encode_s: Encode, encode_t: Encode) -> None:
        self.student, self.teacher = student, teacher
        self.rest = greedy_tokens(teacher, student)  # [D] the first student token of what is left of a teacher token
        whole = np.where(teacher.lengths > 0, self.rest[np.minimum(teacher.offsets[:-1], len(self.rest) - 1)], -1)
        self.first = first_tokens(teacher, encode_s, fallback=whole)  # [V_t]
        greedy = greedy_tokens(student, teacher)
        of_student = np.where(
            student.lengths > 0, greedy[np.minimum(student.offsets[:-1], max(len(greedy) - 1, 0))], -1
        )
        of_student = first_tokens(student, encode_t, fallback=of_student)
        cell = np.where(of_student >= 0, self.first[of_student], -1)
        for _ in range(8):
            cell = np.where(cell >= 0, cell[cell], -1)
        self.cell = np.where(student.lengths > 0, cell, -1)  # [V_s], -1: no text
        self.size = np.bincount(self.cell[self.cell >= 0], minlength=len(student))  # [V_s]
        order = np.argsort(self.cell, kind="stable")
        self.members, self.begin = order, np.searchsorted(self.cell[order], np.arange(len(student) + 1))

    def others(self, cell: int) -> list[int]:
        """A few tokens of a cell beside the one that names it."""
        members = self.members[self.begin[cell] : self.begin[cell + 1]]
        found: list[int] = members[members != cell][:_MEMBERS].tolist()
        return found

    def of_leaves(self, token: Ints, consumed: Ints) -> Ints:
        """The cells of teacher tokens of which `consumed` bytes are written already, -1 where no token fits, `[L]`."""
        at = np.minimum(self.teacher.offsets[token] + consumed, len(self.rest) - 1)
        first = np.where(consumed > 0, self.rest[at], self.first[token])
        return np.where(first >= 0, self.cell[np.maximum(first, 0)], -1)


class Continued:
    """Which cells the rest of a teacher token may turn out to belong to, once more of the text is known.

    Behind "b" the rest "a" of the teacher's "ba" is the student's "a", unless a "b" follows and its tokenizer writes
    "ab". Then the two cells cannot be told apart yet, and are compared as one.
    """

    def __init__(self, cells: CellMap, encode_s: Encode, encode_t: Encode) -> None:
        self.cells, self.encode_s, self.encode_t = cells, encode_s, encode_t
        self._known: dict[tuple[int, int], Ints] = {}

    def cells_of(self, token: int, consumed: int) -> Ints:
        """Cells of the longer student tokens that the teacher would write as this token and more."""
        key = (token, consumed)
        if key not in self._known:
            self._known[key] = self._find(token, consumed)
        return self._known[key]

    def _find(self, token: int, consumed: int) -> Ints:
        cells, student = self.cells, self.cells.student
        whole = cells.teacher.token(token)
        rest = np.frombuffer(whole[consumed:], dtype=np.uint8)
        node = _node(student.trie, rest)
        if node < 0:
            return np.zeros(0, dtype=np.int64)
        longer = student.trie.sorted_ids[student.trie.low[node] : student.trie.high[node]]
        longer = longer[student.lengths[longer] > len(rest)]
        longer = longer[np.argsort(student.lengths[longer], kind="stable")][:_LONGER]
        found = [self._written_alone(whole, consumed, longer), self._written_if_more(whole, consumed, longer)]
        cell = cells.cell[np.concatenate(found)]
        return np.unique(cell[cell >= 0])

    def _written_alone(self, whole: bytes, consumed: int, longer: Ints) -> Ints:
        """Those of the student's tokens that the teacher writes as this token and more."""
        texts = [(whole[:consumed] + self.cells.student.token(i), i) for i in longer.tolist()]
        read = _encoded([text for text, _ in texts], self.encode_t)
        first = self.cells.teacher.token
        kept = [i for (_, i), ids in zip(texts, read, strict=True) if ids and len(ids) > 1 and first(ids[0]) == whole]
        return np.array(kept, dtype=np.int64)

    def _written_if_more(self, whole: bytes, consumed: int, longer: Ints) -> Ints:
        """Those that it would not, unless it goes on with a token that runs past their end."""
        cells, trie = self.cells, self.cells.teacher.trie
        rest, after = whole[consumed:], []
        for i in longer.tolist():
            more = np.frombuffer(cells.student.token(i)[len(rest) :], dtype=np.uint8)
            node = _node(trie, more)
            if node >= 0:
                ids = trie.sorted_ids[trie.low[node] : trie.high[node]]
                ids = ids[cells.teacher.lengths[ids] > len(more)][:_RUN_PAST]
                after += [cells.teacher.token(w) for w in ids.tolist()]
        after = list(dict.fromkeys(after))
        token = cells.teacher.token
        of_teacher = _encoded([whole + w for w in after], self.encode_t)
        split = [w for w, ids in zip(after, of_teacher, strict=True) if ids and [token(i) for i in ids] == [whole, w]]
        of_student = _encoded([rest + w for w in split], self.encode_s)
        return np.array([ids[0] for ids in of_student if ids], dtype=np.int64)


def _node(trie: Any, text: NDArray[np.uint8]) -> int:
    """The trie's node behind `text`, -1: there is none."""
    for _, depth, nodes in trie.walk(text, np.zeros(1, np.int64), np.array([len(text)])):
        if depth == len(text):
            return int(nodes[0]) if len(nodes) else -1
    return -1


def _encoded(texts: list[bytes], encode: Encode) -> list[list[int] | None]:
    """The tokens of each text, None for what is no text by itself or is not written as it is."""
    found: list[list[int] | None] = [None] * len(texts)
    asked: list[tuple[int, str]] = []
    for k, text in enumerate(texts):
        with suppress(UnicodeDecodeError):
            asked.append((k, text.decode("utf-8")))
    for (k, _), read in zip(asked, encode([text for _, text in asked]) if asked else (), strict=True):
        if read.exact.all():
            found[k] = read.ids.tolist()
    return found


class Neighbours:
    """Does the student's tokenizer write two tokens side by side, or would it have cut their text in another way?"""

    def __init__(self, student: Vocabulary, encode_s: Encode) -> None:
        self.student, self.encode = student, encode_s
        self._known: dict[tuple[int, int], bool] = {}

    def allowed(self, pairs: list[tuple[int, int]]) -> list[bool]:
        """For each pair of ids. True for what is no text by itself: nothing can be said of it."""
        new = [p for p in dict.fromkeys(pairs) if p not in self._known]
        texts, asked = [], []
        for pair in new:
            one, other = (self.student.token(i) for i in pair)
            try:
                texts.append((one + other).decode("utf-8"))
                asked.append(pair)
            except UnicodeDecodeError:
                self._known[pair] = True
        for pair, encoded in zip(asked, self.encode(texts) if texts else (), strict=True):
            self._known[pair] = not encoded.exact.all() or encoded.ids.tolist() == list(pair)
        return [self._known[pair] for pair in pairs]

    def some_allowed(self, before: Ints, cell: Ints, cells: CellMap) -> NDArray[np.bool_]:
        """Does a cell hold a token that is written behind the one `before`? `[n]`; `before` is -1 where a text starts."""
        found, doubtful = self._named(before, cell)
        for at in doubtful.tolist():
            found[at] = any(self.allowed([(int(before[at]), m) for m in cells.others(int(cell[at]))]))
        return found

    def all_allowed(self, before: Ints, cell: Ints, cells: CellMap) -> NDArray[np.bool_]:
        """Is that so of all of them, or of none? `[n]`"""
        found = np.ones(len(cell), dtype=np.bool_)
        named, _ = self._named(before, cell)
        for at in np.flatnonzero((before >= 0) & (cells.size[cell] > 1)).tolist():
            others = self.allowed([(int(before[at]), m) for m in cells.others(int(cell[at]))])
            found[at] = all(one == named[at] for one in others)
        return found

    def _named(self, before: Ints, cell: Ints) -> tuple[NDArray[np.bool_], Ints]:
        looked = np.flatnonzero(before >= 0)
        found = np.ones(len(cell), dtype=np.bool_)
        found[looked] = self.allowed(list(zip(before[looked].tolist(), cell[looked].tolist(), strict=True)))
        return found, np.flatnonzero(~found)


class Seams:
    """Which student token begins a text behind a written one, if the tokenizer leaves the written one as it is."""

    def __init__(self, cells: CellMap, encode_s: Encode) -> None:
        self.cells, self.encode = cells, encode_s
        self._known: dict[tuple[int, bytes], tuple[int, bool] | None] = {}

    def begins(self, asked: list[tuple[int, bytes]]) -> list[tuple[int, bool] | None]:
        """For each pair of a token before (-1: none) and a text: the cell of the first token, -1 if none fits, and if
        more of the text could change that; None if nothing is known."""
        new = [one for one in dict.fromkeys(asked) if one not in self._known]
        before = [self.cells.student.token(i) if i >= 0 else b"" for i, _ in new]
        read = _encoded([one + text for one, (_, text) in zip(before, new, strict=True)], self.encode)
        for one, ids in zip(new, read, strict=True):
            if not ids:
                self._known[one] = None
                continue
            ids = ids if one[0] >= 0 else [-1, *ids]
            fits = ids[0] == one[0] and len(ids) > 1
            self._known[one] = (int(self.cells.cell[ids[1]]) if fits else -1), len(ids) <= 2
        return [self._known[one] for one in asked]
