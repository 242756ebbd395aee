"""From the teacher's rows to its distribution over the student's next token, at every boundary.

Shapes: `R` boundaries, `N_t + E` rows of the teacher, `K` likeliest tokens of a row, `Q` pairs of a row and a boundary
that its tokens run past, `L` leaves (a teacher token that may come next, at one boundary), `C` cells of a boundary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diglot.objectives.covering_ahead import Cuts, Leaves, TeacherText, settle
from diglot.objectives.covering_cells import CellMap
from diglot.objectives.covering_plan import CoveringPlan
from diglot.objectives.covering_rows import NEGLIGIBLE, RowsRead
from diglot.objectives.tail import TailTokens

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TeacherRows:
    """All rows that a target is made of: those of the text, then those of the branches."""

    text: Floats  # [N_t] log mass of its tokens; of stop, the whole stop set
    tail: Floats  # [E] of the branches' tokens
    read: RowsRead


@dataclass(frozen=True)
class Targets:
    """The teacher's distribution over the student's cells at each boundary; what no column holds is the rest."""

    column: Ints  # [R, C] a student token that names its cell; -1 for padding
    mass: Floats  # [R, C] in [0, 1]
    stop: Floats  # [R]
    silent: Floats  # [R] of control tokens that do not stop
    own: Ints  # [R] the column of the cell that is split: the written token apart; -1: none is
    own_mass: Floats  # [R] of the written token, at most its cell's
    canonical: Floats  # [R] share of the mass that the student's tokenizer could go on with, in (0, 1]
    longer: Floats  # [R] share that comes from earlier rows


@np.errstate(invalid="ignore")  # numbers that are not finite are noticed where the loss is
def make_targets(
    plan: CoveringPlan,
    rows: TeacherRows,
    cuts: Cuts,
    look: Callable[[TailTokens], RowsRead],
    ids_s: Ints,
    t: TeacherText,
    canonical: bool,
) -> Targets:
    """Mix the rows of each boundary, drop what the student's tokenizer could not have written, and sum by cells.

    `look` reads the teacher behind tokens that may come next: one more piece, where the first does not tell.
    """
    count = len(plan.student)
    log_prefix, weight, start = prefix_masses(plan, rows, t.segment)
    stop = np.exp(rows.read.stop[plan.own]) * weight
    stop = np.where(np.isfinite(log_prefix), stop, np.nan)  # not finite: so is the loss
    previous = np.where((plan.previous >= 0) & canonical, ids_s[np.maximum(plan.previous, 0)], -1)
    leaves = _leaves(plan, rows, cuts.cells, weight, start - log_prefix[plan.earlier.to])
    settled = settle(leaves, previous, cuts, plan.branch, t, rows.read, look, NEGLIGIBLE)
    share = settled.share
    boundary, cell, mass = _summed(settled.boundary, settled.cell, settled.mass, len(cuts.cells.cell))

    place = np.arange(len(boundary)) - np.searchsorted(boundary, boundary)
    column = np.full((count, int(place.max(initial=-1)) + 1), -1, dtype=np.int64)
    dense = np.zeros(column.shape)
    column[boundary, place], dense[boundary, place] = cell, mass
    split, own_mass = _written_token(plan, cuts.cells, ids_s, column, dense, log_prefix + np.log(share))
    silent = np.exp(rows.read.silent[plan.own]) * weight
    return Targets(column, dense, stop / share, silent / share, split, own_mass, share, 1 - weight)


@np.errstate(invalid="ignore")
def prefix_masses(plan: CoveringPlan, rows: TeacherRows, segment_t: Ints) -> tuple[Floats, Floats, Floats]:
    """Log mass of all texts that begin with what is written up to each boundary, `[R]`, the share of the boundary's own
    row in it, `[R]`, and the log mass of the reading up to each earlier row, `[Q]`."""
    count, reach = len(plan.student), reach_of(plan, rows, segment_t)
    own, start = reach(plan.main, plan.last), reach(plan.earlier.main, plan.earlier.last)
    earlier = start + rows.read.range_total
    most = np.maximum(own, _grouped_max(earlier, plan.earlier.to, count))
    whole = np.exp(own - most) + np.bincount(plan.earlier.to, np.exp(earlier - most[plan.earlier.to]), minlength=count)
    log_prefix = most + np.log(whole)
    return log_prefix, np.exp(own - log_prefix), start


def _leaves(plan: CoveringPlan, rows: TeacherRows, cells: CellMap, weight: Floats, start: Floats) -> Leaves:
    """What may come next at each boundary; `weight` is the share of its own row, `start` the log mass of each pair's
    row there."""
    top = np.exp(rows.read.top[plan.own]) * weight[:, None]
    of_pair = np.exp(start[rows.read.leaf_pair] + rows.read.leaf)
    own = np.repeat(np.arange(len(plan.student)), top.shape[1])
    boundary = np.concatenate([own, plan.earlier.to[rows.read.leaf_pair]])
    row = np.concatenate([plan.own[own], plan.earlier.row[rows.read.leaf_pair]])
    token = np.concatenate([rows.read.top_ids[plan.own].ravel(), rows.read.leaf_id])
    consumed = np.concatenate([np.zeros(top.size, dtype=np.int64), plan.earlier.consumed[rows.read.leaf_pair]])
    mass = np.concatenate([top.ravel(), of_pair])
    cell = cells.of_leaves(token, consumed)
    return Leaves(boundary, row, token, consumed, cell, mass).at(np.flatnonzero(mass > 1e-9))


def reach_of(plan: CoveringPlan, rows: TeacherRows, segment_t: Ints) -> Callable[[Ints, Ints], Floats]:
    """Log mass of the teacher's own reading of the text up to a boundary, from the start of its segment."""
    before = np.concatenate([[0.0], np.cumsum(rows.text)])
    tails = rows.tail.copy()
    for depth in range(1, int(plan.branch.depth.max(initial=0)) + 1):
        at = np.flatnonzero(plan.branch.depth == depth)
        tails[at] += tails[at - 1]

    def reach(main: Ints, last: Ints) -> Floats:
        log_mass = before[main] - before[np.searchsorted(segment_t, segment_t[main])] if len(main) else np.zeros(0)
        return log_mass + np.where(last >= 0, tails[np.maximum(last, 0)], 0.0) if len(tails) else log_mass

    return reach


def _grouped_max(values: Floats, group: Ints, count: int) -> Floats:
    most = np.full(count, -np.inf)
    np.maximum.at(most, group, values)
    return most


def _summed(boundary: Ints, cell: Ints, mass: Floats, width: int) -> tuple[Ints, Ints, Floats]:
    """Masses of equal cells of a boundary added up, in order of boundary and cell."""
    key, place = np.unique(boundary * width + cell, return_inverse=True)
    sums = np.bincount(place, mass, minlength=len(key)).astype(np.float64)
    return key // width, key % width, sums


def _written_token(
    plan: CoveringPlan, cells: CellMap, ids_s: Ints, column: Ints, mass: Floats, log_prefix: Floats
) -> tuple[Ints, Floats]:
    """Where the written token shares its cell: the column of the cell, and the token's own mass, from the row after it.

    Both prefixes are masses of texts that begin with what is written, so their ratio is exact up to what the covering
    leaves out, whatever the teacher's pieces are.
    """
    count = len(plan.student)
    written = ids_s[plan.student]
    followed = (plan.following >= 0) & (cells.cell[written] >= 0)
    split, own = np.full(count, -1, dtype=np.int64), np.zeros(count)
    for r in np.flatnonzero(followed).tolist():
        cell = cells.cell[written[r]]
        at = np.flatnonzero(column[r] == cell)
        if len(at) and cells.size[cell] > 1:
            split[r] = at[0]
            ratio = np.exp(min(log_prefix[plan.following[r]] - log_prefix[r], 0.0))
            own[r] = min(ratio, mass[r, split[r]])
    return split, own
