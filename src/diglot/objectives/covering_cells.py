"""Which student token a teacher's token begins, and what the student's tokenizer writes side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diglot.objectives.base import Encode
from diglot.vocabulary import Vocabulary
from diglot.vocabulary.maps import first_tokens, greedy_tokens

Ints = NDArray[np.int64]
_PROBES = 48  # tokens of the teacher that are tried behind another, at most so many
_CHANGED = 0.05  # of those that it would write there: so many must change what they follow
_MEMBERS = 8  # of a cell, at most so many are tried before it is given up as not canonical
_REMEMBERED = 2**18  # answers of a tokenizer to questions of one kind, a quarter of a kilobyte each


class CellMap:
    """Cells of student tokens: a token and those longer ones that the teacher begins with the same token.

    A teacher token says which student token comes next, the first one of its text. It does not say so for a student
    token that the teacher writes in several: that one is in the cell of what the teacher's first piece begins.
    """

    def __init__(self, student: Vocabulary, teacher: Vocabulary, encode_s: Encode, encode_t: Encode) -> None:
        self.student, self.teacher = student, teacher
        self.rest = greedy_tokens(teacher, student)  # [D] the first student token of what is left of a teacher token
        self.first = first_tokens(teacher, student, encode_s)  # [V_t]
        of_student = first_tokens(student, teacher, encode_t)
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


class Probes:
    """Could what follows a teacher token change which student token it begins?

    Behind "b" the rest "a" of the teacher's "ba" is the student's "a", unless a "b" follows and its tokenizer writes
    "ab"; two newlines are one token at the end of a text, and two before a word. Tried with tokens from all over the
    teacher's vocabulary, those of them that it would write behind this one.
    """

    def __init__(self, cells: CellMap, encode_s: Encode, encode_t: Encode) -> None:
        self.cells, self.encode_s, self.encode_t = cells, encode_s, encode_t
        with_text = np.flatnonzero(cells.teacher.lengths > 0)
        chosen = with_text[np.unique(np.linspace(0, len(with_text) - 1, _PROBES).astype(np.int64))]
        self.probes = [cells.teacher.token(i) for i in chosen.tolist()]
        self._known: dict[tuple[int, int], bool] = {}

    def open(self, token: Ints, consumed: Ints, cell: Ints) -> NDArray[np.bool_]:
        """For each token of which `consumed` bytes are written already, and the cell that it seems to begin, `[n]`."""
        forget_oldest(self._known)
        keys = list(zip(token.tolist(), consumed.tolist(), strict=True))
        new = {key: c for key, c in zip(keys, cell.tolist(), strict=True) if key not in self._known}
        piece = self.cells.teacher.token
        wholes = [(key, piece(key[0]), w) for key in new for w in self.probes]
        of_teacher = encoded([whole + w for _, whole, w in wholes], self.encode_t)
        follows = [
            (key, whole[key[1] :] + w)
            for (key, whole, w), ids in zip(wholes, of_teacher, strict=True)
            if ids and [piece(i) for i in ids] == [whole, w]
        ]
        tried, changed = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
        for (key, _), ids in zip(follows, encoded([text for _, text in follows], self.encode_s), strict=True):
            if ids:
                tried[key] += 1
                changed[key] += int(self.cells.cell[ids[0]]) != new[key]
        self._known |= {key: changed[key] > _CHANGED * tried[key] for key in new}
        return np.array([self._known[key] for key in keys], dtype=np.bool_)


def encoded(texts: Sequence[bytes], encode: Encode) -> list[list[int] | None]:
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


def forget_oldest(known: dict[Any, Any], most: int = _REMEMBERED) -> None:
    """Keep the latest `most` entries: texts of a long run ask ever new questions."""
    for key in list(islice(known, max(len(known) - most, 0))):
        del known[key]


class Neighbours:
    """Does the student's tokenizer write two tokens side by side, or would it have cut their text in another way?"""

    def __init__(self, student: Vocabulary, encode_s: Encode) -> None:
        self.student, self.encode = student, encode_s
        self._known: dict[tuple[int, int], bool] = {}

    def allowed(self, pairs: list[tuple[int, int]]) -> list[bool]:
        """For each pair of ids. True for what is no text by itself: nothing can be said of it."""
        forget_oldest(self._known)
        new = [p for p in dict.fromkeys(pairs) if p not in self._known]
        token = self.student.token
        read = encoded([token(one) + token(other) for one, other in new], self.encode)
        self._known |= {pair: ids is None or ids == list(pair) for pair, ids in zip(new, read, strict=True)}
        return [self._known[pair] for pair in pairs]

    def some_allowed(self, before: Ints, cell: Ints, cells: CellMap) -> NDArray[np.bool_]:
        """Does a cell hold a token that is written behind the one `before`, `[n]`? -1: a text starts there."""
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
        forget_oldest(self._known)
        new = [one for one in dict.fromkeys(asked) if one not in self._known]
        before = [self.cells.student.token(i) if i >= 0 else b"" for i, _ in new]
        read = encoded([one + text for one, (_, text) in zip(before, new, strict=True)], self.encode)
        for one, ids in zip(new, read, strict=True):
            if not ids:
                self._known[one] = None
                continue
            ids = ids if one[0] >= 0 else [-1, *ids]
            fits = ids[0] == one[0] and len(ids) > 1
            self._known[one] = (int(self.cells.cell[ids[1]]) if fits else -1), len(ids) <= 2
        return [self._known[one] for one in asked]
