"""Which student token a teacher's token begins, and what the student's tokenizer writes side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from diglot.vocabulary import Speller, Vocabulary
from diglot.vocabulary.maps import continuing, first_tokens, greedy_tokens

Ints = NDArray[np.int64]
_PROBES = 48  # tokens of the teacher that are tried behind another, at most so many
_CHANGED = 0.05  # of those that it would write there: so many must change what they follow
_MEMBERS = 8  # of a cell, at most so many are tried before it is given up as not canonical
_SPACES = b" \t\n\r\v\f"
_REMEMBERED = 2**18  # answers of a tokenizer to questions of one kind, a quarter of a kilobyte each


class CellMap:
    """Cells of student tokens: a token and those longer ones that the teacher begins with the same token.

    A teacher token says which student token comes next, the first one of its text. It does not say so for a student
    token that the teacher writes in several: that one is in the cell of what the teacher's first piece begins.
    """

    def __init__(self, student: Vocabulary, teacher: Vocabulary, spell_s: Speller, spell_t: Speller) -> None:
        self.student, self.teacher = student, teacher
        self.rest = greedy_tokens(teacher, student)  # [D] the first student token of what is left of a teacher token
        self.first = first_tokens(teacher, student, spell_s)  # [V_t]
        of_student = first_tokens(student, teacher, spell_t)
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
        others: list[int] = members[members != cell][:_MEMBERS].tolist()
        return others

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

    def __init__(self, cells: CellMap, spell_s: Speller, spell_t: Speller) -> None:
        self.cells = cells
        self.spell_s, self.spell_t = continuing(cells.student, spell_s), continuing(cells.teacher, spell_t)
        with_text = np.flatnonzero(cells.teacher.lengths > 0)
        chosen = with_text[np.unique(np.linspace(0, len(with_text) - 1, _PROBES).astype(np.int64))]
        self.probes = [cells.teacher.token(i) for i in chosen.tolist()]
        self._known: dict[tuple[int, int], bool] = {}

    def open(self, token: Ints, consumed: Ints, cell: Ints) -> NDArray[np.bool_]:
        """For each token of which `consumed` bytes are written already, and the cell that it seems to begin, `[n]`."""
        forget_oldest(self._known)
        keys = list(zip(token.tolist(), consumed.tolist(), strict=True))
        new = {key: c for key, c in zip(keys, cell.tolist(), strict=True) if key not in self._known}
        begins = self._begins(list(new))
        changed = {key: [k for k, c in of_key.items() if c != new[key]] for key, of_key in begins.items()}
        # Most tokens need no more, and the others seldom all probes: only where few changes might be enough or not.
        confirmed = self._written_behind(changed)
        doubtful = [key for key, count in confirmed.items() if 0 < count <= _CHANGED * len(begins[key])]
        unchanged = {key: [k for k in begins[key] if k not in changed[key]] for key in doubtful}
        tried = self._written_behind(unchanged)
        for key, count in confirmed.items():
            self._known[key] = count > 0 and (key not in tried or count > _CHANGED * (count + tried[key]))
        return np.array([self._known[key] for key in keys], dtype=np.bool_)

    def _begins(self, keys: list[tuple[int, int]]) -> dict[tuple[int, int], dict[int, int]]:
        """Which cell what is left of each token begins, if a probe follows: by the probe's number, where it is text."""
        rest = [self.cells.teacher.token(i)[consumed:] for i, consumed in keys]
        alone = self.spell_s(rest)
        cuts = self.cells.student.word_cuts
        begins: dict[tuple[int, int], dict[int, int]] = {key: {} for key in keys}
        to_spell: list[tuple[tuple[int, int], int, bytes]] = []
        for key, text, ids in zip(keys, rest, alone, strict=True):
            ends_in_space = text[-1:].isspace()
            for k, probe in enumerate(self.probes):
                if ends_in_space or probe[0] not in cuts:
                    to_spell.append((key, k, text + probe))
                elif ids:  # the student's tokenizer cuts here, whatever follows
                    begins[key][k] = int(self.cells.cell[ids[0]])
        for (key, k, _), ids in zip(to_spell, self.spell_s([text for *_, text in to_spell]), strict=True):
            if ids:
                begins[key][k] = int(self.cells.cell[ids[0]])
        return begins

    def _written_behind(self, probes: dict[tuple[int, int], list[int]]) -> dict[tuple[int, int], int]:
        """How many of some probes the teacher's tokenizer would write behind each token, as they are."""
        piece = self.cells.teacher.token
        pairs = [(key, piece(key[0]), self.probes[k]) for key, of_key in probes.items() for k in of_key]
        counts = dict.fromkeys(probes, 0)
        read = self.spell_t([whole + probe for _, whole, probe in pairs])
        for (key, *pair), ids in zip(pairs, read, strict=True):
            counts[key] += ids is not None and [piece(i) for i in ids] == pair
        return counts


def forget_oldest(known: dict[Any, Any], most: int = _REMEMBERED) -> None:
    """Keep the latest `most` entries: texts of a long run ask ever new questions."""
    for key in list(islice(known, max(len(known) - most, 0))):
        del known[key]


class Neighbours:
    """Does the student's tokenizer write two tokens side by side, or would it have cut their text in another way?"""

    def __init__(self, student: Vocabulary, spell_s: Speller) -> None:
        self.student, self.spell = student, continuing(student, spell_s)
        self._known: dict[tuple[int, ...], bool] = {}
        self._alone: dict[tuple[int, ...], bool | None] = {}
        is_text, last = student.lengths > 0, len(student.data) - 1
        begin, end = (student.data[np.clip(at, 0, last)] for at in (student.offsets[:-1], student.offsets[1:] - 1))
        self._cut_behind = is_text & ~np.isin(end, np.frombuffer(_SPACES, np.uint8))  # [V_s]
        self._cut_before = is_text & np.isin(begin, list(student.word_cuts))

    def allowed(self, pairs: list[tuple[int, int]]) -> list[bool]:
        """For each pair of ids. True for what is no text by itself: nothing can be said of it."""
        answers = list(map(self._known.get, pairs))
        if None not in answers:  # nearly always, once a run is under way
            return cast(list[bool], answers)
        forget_oldest(self._known)
        self._find_out([pair for pair in dict.fromkeys(pairs) if pair not in self._known])
        return [self._known[pair] for pair in pairs]

    def _find_out(self, new: list[tuple[int, int]]) -> None:
        # Where the tokenizer cuts in any case, it writes each of the two by itself: there are fewer tokens than pairs.
        ids = np.array(new, dtype=np.int64)
        cut = self._cut_behind[ids[:, 0]] & self._cut_before[ids[:, 1]]
        apart = [pair for pair, is_cut in zip(new, cut.tolist(), strict=True) if is_cut]
        alone = dict.fromkeys((token,) for pair in apart for token in pair)
        self._ask([*(one for one in alone if one not in self._alone)], self._alone)
        for one, other in apart:
            of_one, of_other = self._alone[one,], self._alone[other,]
            self._known[one, other] = of_one is None or of_other is None or (of_one and of_other)
        together: dict[tuple[int, ...], bool | None] = {}
        self._ask([pair for pair in new if pair not in self._known], together)
        self._known |= {pair: answer is not False for pair, answer in together.items()}

    def _ask(self, new: Sequence[tuple[int, ...]], known: dict[tuple[int, ...], bool | None]) -> None:
        """Does the tokenizer write the text of these tokens with them? None for what is no text."""
        read = self.spell([b"".join(map(self.student.token, ids)) for ids in new])
        known |= {ids: None if spelt is None else spelt == list(ids) for ids, spelt in zip(new, read, strict=True)}

    def some_allowed(self, before: Ints, cell: Ints, cells: CellMap) -> NDArray[np.bool_]:
        """Does a cell hold a token that is written behind the one `before`, `[n]`? -1: a text starts there."""
        allowed, doubtful = self._named(before, cell)
        doubtful = doubtful[cells.size[cell[doubtful]] > 1]
        allowed[doubtful] = [any(of_cell) for of_cell in self._others(before[doubtful], cell[doubtful], cells)]
        return allowed

    def all_allowed(self, before: Ints, cell: Ints, cells: CellMap) -> NDArray[np.bool_]:
        """Is that so of all of them, or of none? `[n]`"""
        unanimous = np.ones(len(cell), dtype=np.bool_)
        named, _ = self._named(before, cell)
        looked = np.flatnonzero((before >= 0) & (cells.size[cell] > 1))
        others = self._others(before[looked], cell[looked], cells)
        unanimous[looked] = [
            all(one == name for one in of_cell) for name, of_cell in zip(named[looked], others, strict=True)
        ]
        return unanimous

    def _others(self, before: Ints, cell: Ints, cells: CellMap) -> list[list[bool]]:
        """Are the other tokens of a cell written behind a token? For each `[n]`; all are asked about in one call."""
        members = [cells.others(c) for c in cell.tolist()]
        pairs = [(one, m) for one, of_cell in zip(before.tolist(), members, strict=True) for m in of_cell]
        answers = iter(self.allowed(pairs))
        return [[next(answers) for _ in of_cell] for of_cell in members]

    def _named(self, before: Ints, cell: Ints) -> tuple[NDArray[np.bool_], Ints]:
        looked = np.flatnonzero(before >= 0)
        allowed = np.ones(len(cell), dtype=np.bool_)
        allowed[looked] = self.allowed(list(zip(before[looked].tolist(), cell[looked].tolist(), strict=True)))
        return allowed, np.flatnonzero(~allowed)


class Seams:
    """Which student token begins a text behind a written one, if the tokenizer leaves the written one as it is."""

    def __init__(self, cells: CellMap, spell_s: Speller) -> None:
        self.cells, self.spell = cells, continuing(cells.student, spell_s)
        self._known: dict[tuple[int, bytes], tuple[int, bool] | None] = {}

    def begins(self, pairs: list[tuple[int, bytes]]) -> list[tuple[int, bool] | None]:
        """For each pair of a token before (-1: none) and a text: the cell of the first token, -1 if none fits, and if
        more of the text could change that; None if nothing is known."""
        forget_oldest(self._known)
        new = [one for one in dict.fromkeys(pairs) if one not in self._known]
        before = [self.cells.student.token(i) if i >= 0 else b"" for i, _ in new]
        read = self.spell([one + text for one, (_, text) in zip(before, new, strict=True)])
        for one, ids in zip(new, read, strict=True):
            if not ids:
                self._known[one] = None
                continue
            ids = ids if one[0] >= 0 else [-1, *ids]
            fits = ids[0] == one[0] and len(ids) > 1
            self._known[one] = (int(self.cells.cell[ids[1]]) if fits else -1), len(ids) <= 2
        return [self._known[one] for one in pairs]
