"""One more piece of the teacher, where its first one does not say how the student's tokenizer would cut the text.

Behind the student's "b" the teacher's "a" may be the student's "a" (if a "b" follows, which its tokenizer puts with
the "a"), or none at all (if the text stops, its tokenizer would have written "ba"). The teacher's row behind that piece
says how likely each is.

Shapes: `L` leaves, each a teacher token that may come next at a boundary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diglot.objectives.covering_cells import CellMap, Continued, Neighbours, Seams
from diglot.objectives.covering_rows import RowsRead
from diglot.objectives.tail import TailTokens

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
_LOOK = 1e-2  # of the mass of a boundary: a leaf of less is not looked behind
_PIECES = 3  # of the teacher, behind the first, at most so many
_SMALL = 1e-4  # of the mass of a boundary: what follows a leaf with less is not told apart


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


def open_leaves(leaves: Leaves, previous: Ints, cells: CellMap, continued: Continued, neighbours: Neighbours) -> Ints:
    """Which leaves begin one token or another, or none, depending on what follows them."""
    heavy = np.flatnonzero((leaves.mass > _LOOK) & (leaves.cell >= 0))
    before = previous[leaves.boundary[heavy]]
    sure = neighbours.all_allowed(before, leaves.cell[heavy], cells)
    longer = [
        bool((continued.cells_of(token, consumed) != cell).any())
        for token, consumed, cell in zip(
            leaves.token[heavy].tolist(), leaves.consumed[heavy].tolist(), leaves.cell[heavy].tolist(), strict=True
        )
    ]
    return heavy[~sure | np.array(longer, dtype=np.bool_)]


@dataclass(frozen=True)
class Paths:
    """What may come next, as far as it was looked at: some pieces behind a row of the teacher, `[L]` each."""

    boundary: list[int]
    row: list[int]
    pieces: list[tuple[int, ...]]
    text: list[bytes]  # not written yet
    mass: list[float]


def branches_behind(paths: Paths, branch: TailTokens, count: int) -> tuple[TailTokens, Ints]:
    """The teacher's tokens to read for rows behind `paths`, and for each path the place of its last token there.

    `count` is how many rows the text has; row `count + e` follows token `e` of `branch`.
    """
    known: dict[tuple[int, tuple[int, ...]], int] = {}
    ids: list[int] = []
    before: list[int] = []
    depth: list[int] = []
    place = np.zeros(len(paths.row), dtype=np.int64)
    for k, key in enumerate(zip(paths.row, paths.pieces, strict=True)):
        if key not in known:
            row, pieces = key
            e = row - count
            earlier = branch.ids[e - int(branch.depth[e]) : e + 1].tolist() if e >= 0 else []
            path = [*earlier, *pieces]
            ids += path
            before += [int(branch.before[e]) if e >= 0 else row] * len(path)
            depth += range(len(path))
            known[key] = len(ids) - 1
        place[k] = known[key]
    arrays = [np.array(x, dtype=np.int64) for x in (ids, before, depth)]
    return TailTokens(*arrays, np.zeros(len(ids), dtype=np.int64)), place


def look_ahead(
    leaves: Leaves,
    previous: Ints,
    branch: TailTokens,
    count: int,
    cells: CellMap,
    seams: Seams,
    look: Callable[[TailTokens], RowsRead],
) -> tuple[Ints, Ints, Floats, Floats]:
    """Boundary, cell (-1: the student's tokenizer would not have come here) and mass of what follows the leaves; and
    the mass of each leaf that nothing more is known of, `[L]`."""
    token = cells.teacher.token
    owner = list(range(len(leaves.token)))
    pieces = [(int(i),) for i in leaves.token]
    text = [token(i)[k:] for (i,), k in zip(pieces, leaves.consumed.tolist(), strict=True)]
    paths = Paths(leaves.boundary.tolist(), leaves.row.tolist(), pieces, text, leaves.mass.tolist())
    left = leaves.mass.copy()
    known: list[tuple[int, int, float]] = []
    for level in range(_PIECES):
        if not paths.row:
            break
        tail, place = branches_behind(paths, branch, count)
        behind = look(tail)
        more: list[tuple[int, int, int, tuple[int, ...], bytes, float]] = []
        ends: list[bool] = []
        for k, at in enumerate(place.tolist()):
            of_path = owner[k], paths.boundary[k], paths.row[k], paths.pieces[k]
            follows = np.exp(behind.top[at]) * paths.mass[k]
            more.append((*of_path, paths.text[k], float(np.exp(behind.stop[at])) * paths.mass[k]))
            ends.append(True)
            for i, mass in zip(behind.top_ids[at].tolist(), follows.tolist(), strict=True):
                if mass > _SMALL:
                    more.append((*of_path[:3], (*of_path[3], i), paths.text[k] + token(i), mass))
                    ends.append(False)
        found = seams.begins([(int(previous[b]), text) for _, b, _, _, text, _ in more])
        go_on = []
        for one, end, begins in zip(more, ends, found, strict=True):
            if begins is None:
                continue
            own, b, _, _, _, mass = one
            cell, is_open = begins
            if is_open and not end and mass > _LOOK and level + 1 < _PIECES:
                go_on.append(one)
                continue
            left[own] -= mass
            known.append((b, cell, mass))
        if level + 1 < _PIECES:
            owner = [one[0] for one in go_on]
            paths = Paths(*([one[n] for one in go_on] for n in range(1, 6)))
    boundary, cell, mass = (np.array([one[n] for one in known]) for n in range(3))
    return boundary.astype(np.int64), cell.astype(np.int64), mass.astype(np.float64), np.maximum(left, 0.0)
