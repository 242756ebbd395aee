"""More pieces of the teacher, where its first one does not say how the student's tokenizer would cut the text.

Behind the student's "b" the teacher's "a" may be the student's "a" (if a "b" follows, which its tokenizer puts with
the "a"), or none at all (if the text stops, its tokenizer would have written "ba"). The teacher's row behind that piece
says how likely each is.

Shapes: `L` leaves, each a teacher token that may come next at a boundary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from diglot.objectives.covering_cells import CellMap, Neighbours, Probes, Seams
from diglot.objectives.covering_rows import RowsRead
from diglot.objectives.tail import TailTokens

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
_LOOK = 3e-2  # of the mass of a boundary: a leaf of less is not looked behind
_PIECES = 3  # of the teacher, behind the first, at most so many
_SMALL = 1e-4  # of the mass of a boundary: what follows a leaf with less is not told apart
_HOPELESS = 0.99  # of it: where more could not be written, the tokens so far are not the student tokenizer's own


@dataclass(frozen=True)
class Leaves:
    """Teacher tokens that may come next, `[L]` each."""

    boundary: Ints
    row: Ints  # which row of the teacher gave them
    token: Ints
    consumed: Ints  # bytes of the token that are written already
    cell: Ints  # the student's cell that they seem to begin, -1: none
    mass: Floats  # of all that begins with the text up to the boundary

    def at(self, which: Ints) -> Leaves:
        """Some of them."""
        return Leaves(*(getattr(self, name)[which] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class TeacherText:
    """The teacher's scored tokens, `[N_t]` each."""

    ids: Ints
    segment: Ints


@dataclass(frozen=True)
class Cuts:
    """How the student's tokenizer cuts what the teacher may write."""

    cells: CellMap
    probes: Probes
    neighbours: Neighbours
    seams: Seams


@dataclass(frozen=True)
class Ahead:
    """What is known by looking further."""

    boundary: Ints  # [A]
    cell: Ints  # [A] -1: the student's tokenizer would not have come here
    mass: Floats  # [A]
    left: Floats  # [L] of each leaf, what nothing more is known of


def open_leaves(leaves: Leaves, previous: Ints, cuts: Cuts) -> Ints:
    """Which leaves begin one token or another, or none, depending on what follows them."""
    heavy = np.flatnonzero((leaves.mass > _LOOK) & (leaves.cell >= 0))
    some = leaves.at(heavy)
    sure = cuts.neighbours.all_allowed(previous[some.boundary], some.cell, cuts.cells)
    return heavy[~sure | cuts.probes.open(some.token, some.consumed, some.cell)]


@dataclass(frozen=True)
class _Path:
    """What may come next, as far as it was looked at: some pieces behind a row of the teacher."""

    leaf: int
    boundary: int
    row: int
    pieces: tuple[int, ...]
    text: bytes  # that is not written yet
    mass: float

    def advanced(self, there: Mapping[tuple[int, int], int]) -> _Path:
        """From the last row of the path that is known already."""
        row, pieces = self.row, self.pieces
        while pieces and (row, pieces[0]) in there:
            row, pieces = there[row, pieces[0]], pieces[1:]
        return self if row == self.row else replace(self, row=row, pieces=pieces)


def branches_behind(paths: Sequence[_Path], branch: TailTokens, count: int) -> tuple[TailTokens, Ints]:
    """The teacher's tokens to read for rows behind `paths`, and for each path the place of its last token there.

    `count` is how many rows the text has; row `count + e` follows token `e` of `branch`. A path without pieces has
    the place -1: its row is there.
    """
    known: dict[tuple[int, tuple[int, ...]], int] = {}
    ids: list[int] = []
    before: list[int] = []
    depth: list[int] = []
    place = np.full(len(paths), -1, dtype=np.int64)
    for k, key in enumerate((path.row, path.pieces) for path in paths):
        row, pieces = key
        if key not in known and pieces:
            e = row - count
            earlier = branch.ids[e - int(branch.depth[e]) : e + 1].tolist() if e >= 0 else []
            path = [*earlier, *pieces]
            ids += path
            before += [int(branch.before[e]) if e >= 0 else row] * len(path)
            depth += range(len(path))
            known[key] = len(ids) - 1
        place[k] = known.get(key, -1)
    arrays = (np.array(x, dtype=np.int64) for x in (ids, before, depth, [-1] * len(ids)))
    return TailTokens(*arrays), place


@dataclass(frozen=True)
class Settled:
    """Which of the student's cells the leaves begin, as shares of their boundary."""

    boundary: Ints  # [S]
    cell: Ints  # [S] a boundary's cell may be there more than once
    mass: Floats  # [S] of what the student's tokenizer could write; 0 where that is nothing
    share: Floats  # [R] how much of the whole mass that is
    vague: Floats  # [R] of which it is not known what it begins


def settle(
    leaves: Leaves,
    previous: Ints,
    cuts: Cuts,
    branch: TailTokens,
    text: TeacherText,
    rows: RowsRead,
    look: Callable[[TailTokens], RowsRead] | None,
    least: float,
) -> Settled:
    """Drop what the student's tokenizer could not have written behind `previous`, `[R]`, and look ahead where it is
    open what a leaf begins. What that leaves open counts for the leaf's own cell; as vague, if `look` is not given.

    Args:
        least: mass of a leaf that is tried against the student's tokenizer.
    """
    count, which = len(previous), open_leaves(leaves, previous, cuts)
    ahead = look_ahead(leaves.at(which), previous, branch, text, rows, cuts, look)
    left, vague = leaves.mass.copy(), np.zeros(count)
    if look is None:
        left[which] = 0.0
        vague += np.bincount(leaves.boundary[which], ahead.left, minlength=count)
    else:
        left[which] = ahead.left
    refused = np.zeros(len(left), dtype=np.bool_)
    tried = np.flatnonzero((left > least) & (leaves.cell >= 0))
    refused[tried] = ~cuts.neighbours.some_allowed(previous[leaves.boundary[tried]], leaves.cell[tried], cuts.cells)
    lost = np.zeros(count)
    lost += np.bincount(ahead.boundary, ahead.mass * (ahead.cell < 0), minlength=count)
    lost += np.bincount(leaves.boundary, left * refused, minlength=count)
    hopeless = lost > _HOPELESS
    lost[hopeless], vague[hopeless] = 0.0, 0.0
    left = np.where(hopeless[leaves.boundary], leaves.mass, np.where(refused, 0.0, left))
    from_leaves = np.flatnonzero(leaves.cell >= 0)
    from_ahead = np.flatnonzero((ahead.cell >= 0) & ~hopeless[ahead.boundary])
    boundary = np.concatenate([leaves.boundary[from_leaves], ahead.boundary[from_ahead]])
    cell = np.concatenate([leaves.cell[from_leaves], ahead.cell[from_ahead]])
    mass = np.concatenate([left[from_leaves], ahead.mass[from_ahead]])
    share = 1 - lost
    return Settled(boundary, cell, mass / share[boundary], share, vague / share)


def _next_rows(branch: TailTokens, text: TeacherText) -> dict[tuple[int, int], int]:
    """Rows behind a row and a token, as far as they are there: of the text, and of branches."""
    count = len(text.ids)
    follows = np.flatnonzero(text.segment[1:] == text.segment[:-1])
    known = {(i, int(text.ids[i])): i + 1 for i in follows.tolist()}
    known |= {(r, i): count + e for e, (r, i) in enumerate(zip(branch.row.tolist(), branch.ids.tolist(), strict=True))}
    return known


def look_ahead(
    leaves: Leaves,
    previous: Ints,
    branch: TailTokens,
    text: TeacherText,
    rows: RowsRead,
    cuts: Cuts,
    look: Callable[[TailTokens], RowsRead] | None,
) -> Ahead:
    """Which student token each of the leaves turns out to begin, once more of the teacher's pieces are known.

    `look` reads the teacher behind pieces; without it there are the rows of `text` and `branch` alone.
    """
    token, there = cuts.cells.teacher.token, _next_rows(branch, text)
    left, known = leaves.mass.copy(), list[tuple[int, int, float]]()
    before: list[int] = previous[leaves.boundary].tolist()
    todo = [
        _Path(k, b, r, (i,), token(i)[c:], m)
        for k, (b, r, i, c, m) in enumerate(
            zip(
                *(x.tolist() for x in (leaves.boundary, leaves.row, leaves.token, leaves.consumed, leaves.mass)),
                strict=True,
            )
        )
        if look is not None or (r, i) in there
    ]
    for level in range(_PIECES):
        todo = [path.advanced(there) for path in todo]
        if look is None:
            todo = [path for path in todo if not path.pieces]
        tail, place = branches_behind(todo, branch, len(text.ids))
        more = _continued(todo, place, rows, look(tail) if look is not None and len(tail.ids) else rows)
        texts = [todo[p].text + token(i) if i >= 0 else todo[p].text for p, i, _ in more]
        first_cells = cuts.seams.begins([(before[todo[p].leaf], one) for (p, *_), one in zip(more, texts, strict=True)])
        longer: list[_Path] = []
        for (p, i, mass), one, begins in zip(more, texts, first_cells, strict=True):
            if begins is None:
                continue
            (cell, is_open), path = begins, todo[p]
            if is_open and i >= 0 and mass > _LOOK and level + 1 < _PIECES:
                longer.append(_Path(path.leaf, path.boundary, path.row, (*path.pieces, i), one, mass))
            else:
                left[path.leaf] -= mass
                known.append((path.boundary, cell, mass))
        todo = longer
    table = np.array(known, dtype=np.float64).reshape(-1, 3)
    return Ahead(table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2], np.maximum(left, 0.0))


def _continued(paths: Sequence[_Path], place: Ints, rows: RowsRead, behind: RowsRead) -> list[tuple[int, int, float]]:
    """Each path with each piece that may come behind it, and with its end, whose piece is -1: path, piece, mass.

    `place` is the row of each path among those `behind`, -1: its own row is among `rows`.
    """
    there, mass = place < 0, np.array([path.mass for path in paths])
    parts = []
    for read, which, at in (
        (rows, np.flatnonzero(there), np.array([path.row for path in paths], dtype=np.int64)[there]),
        (behind, np.flatnonzero(~there), place[~there]),
    ):
        of_piece = np.exp(read.top[at]) * mass[which, None]
        path, k = np.nonzero(of_piece > _SMALL)
        parts.append((which, np.full(len(which), -1), np.exp(read.stop[at]) * mass[which]))
        parts.append((which[path], read.top_ids[at[path], k], of_piece[path, k]))
    columns = [np.concatenate(x) for x in zip(*parts, strict=True)]
    order = np.argsort(columns[0], kind="stable")
    return list(zip(*(x[order].tolist() for x in columns), strict=True))
