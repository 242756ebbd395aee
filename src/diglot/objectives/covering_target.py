"""From the teacher's rows to its distribution over the student's next token, at every boundary.

Shapes: `R` boundaries, `N_t + E` rows of the teacher, `K` likeliest tokens of a row, `Q` pairs of a row and a boundary
that its tokens run past, `L` leaves (a teacher token that may come next, at one boundary), `C` cells of a boundary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diglot.objectives.base import Encode
from diglot.objectives.covering_plan import CoveringPlan
from diglot.objectives.masses import ragged
from diglot.vocabulary import Vocabulary
from diglot.vocabulary.maps import first_tokens, greedy_tokens

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
_NEGLIGIBLE = 1e-4  # of the mass of a range, or of a boundary: a leaf that is not looked at by itself
_LONGER = 64  # student tokens that begin with the rest of a teacher token, at most so many, the shortest first
_UNSURE = 1e-3  # of the mass of a boundary: below it, what a rest may turn into is not looked at
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

    def __init__(self, cells: CellMap, encode_t: Encode) -> None:
        self.cells, self.encode = cells, encode_t
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
        node = -1
        for _, depth, nodes in student.trie.walk(rest, np.zeros(1, np.int64), np.array([len(rest)])):
            node = int(nodes[0]) if len(nodes) and depth == len(rest) else -1
        if node < 0:
            return np.zeros(0, dtype=np.int64)
        longer = student.trie.sorted_ids[student.trie.low[node] : student.trie.high[node]]
        longer = longer[student.lengths[longer] > len(rest)]
        longer = longer[np.argsort(student.lengths[longer], kind="stable")][:_LONGER]
        texts, ids = [], []
        for i in longer.tolist():
            with suppress(UnicodeDecodeError):
                texts.append((whole[:consumed] + student.token(i)).decode("utf-8"))
                ids.append(i)
        read = self.encode(texts) if texts else ()
        ids = [i for i, e in zip(ids, read, strict=True) if len(e.ids) > 1 and e.ids[0] == token]
        found = cells.cell[np.array(ids, dtype=np.int64)]
        return np.unique(found[found >= 0])


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


@dataclass(frozen=True)
class TeacherRows:
    """What is read of the teacher's rows, in numpy; masses as natural logarithms."""

    text: Floats  # [N_t] of its tokens; of stop, the whole stop set
    tail: Floats  # [E] of the branches' tokens
    stop: Floats  # [N_t + E] of the stop set
    top_ids: Ints  # [N_t + E, K] likeliest tokens that have bytes
    top: Floats  # [N_t + E, K]
    leaf_pair: Ints  # [L] tokens of the pairs' ranges
    leaf_id: Ints  # [L]
    leaf: Floats  # [L]
    range_total: Floats  # [Q] of each pair's whole range


@torch.no_grad()
def read_teacher(
    parts: Iterable[tuple[slice, Tensor]],
    plan: CoveringPlan,
    text_ids: Ints,
    text_stop: NDArray[np.bool_],
    stop_ids: Tensor,
    has_bytes: Tensor,
    sorted_ids: Tensor,
    top_k: int,
) -> TeacherRows:
    """One pass over log-probs `[r, V_t]` of all rows, part by part."""
    count = len(text_ids)
    query_row = np.concatenate([np.arange(count), plan.branch.row])
    query_id = np.concatenate([text_ids, plan.branch.ids])
    order, by_row = np.argsort(query_row, kind="stable"), np.argsort(plan.earlier.row, kind="stable")
    sorted_query, sorted_pair = query_row[order], plan.earlier.row[by_row]
    found = np.zeros(len(query_row))
    stop, top_ids, top = [], [], []
    leaf_pair, leaf_id, leaf = [], [], []
    total = np.full(len(plan.earlier.row), -np.inf)
    silent = torch.zeros(len(has_bytes), dtype=torch.float32, device=has_bytes.device).masked_fill(
        ~has_bytes, -torch.inf
    )
    silent[stop_ids.to(silent.device)] = -torch.inf
    for at, logp in parts:
        device, rows = logp.device, slice(at.start, at.start + len(logp))
        stop.append(logp[:, stop_ids.to(device)].logsumexp(-1))
        best = (logp + silent.to(device)).topk(min(top_k, logp.shape[1]), dim=-1)
        top_ids.append(best.indices.cpu())
        top.append(best.values.cpu())
        low, high = np.searchsorted(sorted_query, [rows.start, rows.stop])
        here = order[low:high]
        index = [torch.from_numpy(x).to(device) for x in (query_row[here] - rows.start, query_id[here])]
        found[here] = logp[index[0], index[1]].double().cpu().numpy()
        low, high = np.searchsorted(sorted_pair, [rows.start, rows.stop])
        if high > low:
            pair = by_row[low:high]
            bounds = [torch.from_numpy(x[pair]).to(device) for x in (plan.earlier.low, plan.earlier.high)]
            place, owner = ragged(*bounds)
            token = sorted_ids.to(device)[place]
            row = torch.from_numpy(plan.earlier.row[pair] - rows.start).to(device)[owner]
            value = logp[row, token].double()
            most = torch.full((len(pair),), -torch.inf, dtype=torch.float64, device=device)
            most.scatter_reduce_(0, owner, value, "amax")
            sums = torch.zeros_like(most).index_add_(0, owner, (value - most[owner]).exp())
            total[pair] = (most + sums.log()).cpu().numpy()
            kept = value > most[owner] + np.log(_NEGLIGIBLE)
            leaf_pair.append(pair[owner[kept].cpu().numpy()])
            leaf_id.append(token[kept].cpu().numpy())
            leaf.append(value[kept].cpu().numpy())
    empty = [np.zeros(0, dtype=np.int64)]
    all_stop = torch.cat(stop).double().cpu().numpy()
    text = np.where(text_stop, all_stop[:count], found[:count])
    return TeacherRows(
        text,
        found[count:],
        all_stop,
        torch.cat(top_ids).numpy(),
        torch.cat(top).double().numpy(),
        np.concatenate(leaf_pair or empty),
        np.concatenate(leaf_id or empty),
        np.concatenate(leaf or [np.zeros(0)]),
        total,
    )


@dataclass(frozen=True)
class Targets:
    """The teacher's distribution over the student's cells at each boundary; what no column holds is the rest."""

    column: Ints  # [R, C] a student token that names its cell; -1 for padding
    mass: Floats  # [R, C] in [0, 1]
    group: Ints  # [R, C] the first of the columns that are compared as one; its mass is theirs
    stop: Floats  # [R]
    own: Ints  # [R] the column of the cell that is split: the written token apart; -1: none is
    own_mass: Floats  # [R] of the written token, at most its cell's
    canonical: Floats  # [R] share of the mass that the student's tokenizer could go on with, in (0, 1]
    longer: Floats  # [R] share that comes from earlier rows


@np.errstate(invalid="ignore")  # numbers that are not finite are noticed where the loss is
def make_targets(
    plan: CoveringPlan,
    rows: TeacherRows,
    cells: CellMap,
    continued: Continued,
    neighbours: Neighbours | None,
    ids_s: Ints,
    segment_t: Ints,
) -> Targets:
    """Mix the rows of each boundary, drop what the student's tokenizer could not have written, and sum by cells."""
    count = len(plan.student)
    reach = _reach(plan, rows, segment_t)
    own, earlier = reach(plan.main, plan.last), reach(plan.earlier.main, plan.earlier.last) + rows.range_total
    most = np.maximum(own, _grouped_max(earlier, plan.earlier.to, count))
    whole = np.exp(own - most) + np.bincount(plan.earlier.to, np.exp(earlier - most[plan.earlier.to]), minlength=count)
    log_prefix = most + np.log(whole)  # [R] of all texts that begin with what is written up to here
    weight = np.exp(own - log_prefix)

    to_pair = plan.earlier.to[rows.leaf_pair]
    start = earlier - rows.range_total
    of_pair = np.exp(start[rows.leaf_pair] + rows.leaf - log_prefix[to_pair])
    top = np.exp(rows.top[plan.own]) * weight[:, None]
    boundary = np.concatenate([np.repeat(np.arange(count), top.shape[1]), to_pair])
    token = np.concatenate([rows.top_ids[plan.own].ravel(), rows.leaf_id])
    consumed = np.concatenate([np.zeros(top.size, dtype=np.int64), plan.earlier.consumed[rows.leaf_pair]])
    mass = np.concatenate([top.ravel(), of_pair])
    stop = np.where(np.isfinite(log_prefix), np.exp(rows.stop[plan.own]) * weight, np.nan)  # not finite: so is the loss
    some = mass > 1e-9
    boundary, mass = boundary[some], mass[some]
    cell = cells.of_leaves(token[some], consumed[some])
    unsure = _unsure(boundary, token[some], consumed[some], cell, mass, continued)
    known = cell >= 0
    boundary = np.concatenate([boundary[known], unsure[:, 0]])
    cell, mass = np.concatenate([cell[known], unsure[:, 2]]), np.concatenate([mass[known], np.zeros(len(unsure))])
    boundary, cell, mass = _summed(boundary, cell, mass, len(cells.cell))

    refused = np.zeros(len(cell), dtype=np.bool_)
    if neighbours is not None:
        refused = _refused(plan, cells, neighbours, ids_s, boundary, cell, mass)
    lost = np.bincount(boundary, mass * refused, minlength=count)
    hopeless = lost > 0.999  # the written tokens are not the student tokenizer's own: nothing to hold on to
    refused &= ~hopeless[boundary]
    canonical = 1 - np.where(hopeless, 0, lost)
    boundary, cell, mass = boundary[~refused], cell[~refused], mass[~refused] / canonical[boundary[~refused]]
    stop = stop / canonical

    place = np.arange(len(boundary)) - np.searchsorted(boundary, boundary)
    column = np.full((count, int(place.max(initial=-1)) + 1), -1, dtype=np.int64)
    dense = np.zeros(column.shape)
    column[boundary, place], dense[boundary, place] = cell, mass
    group = _as_one(column, dense, unsure)
    split, own_mass = _written_token(plan, cells, ids_s, column, dense, group, log_prefix + np.log(canonical))
    return Targets(column, dense, group, stop, split, own_mass, canonical, 1 - weight)


def _unsure(boundary: Ints, token: Ints, consumed: Ints, cell: Ints, mass: Floats, continued: Continued) -> Ints:
    """Pairs of cells that cannot be told apart yet, `[pairs, 3]`: boundary, cell, other cell."""
    found = []
    for k in np.flatnonzero((consumed > 0) & (cell >= 0) & (mass > _UNSURE)).tolist():
        for other in continued.cells_of(int(token[k]), int(consumed[k])).tolist():
            if other != cell[k]:
                found.append((boundary[k], cell[k], other))
    return np.array(found, dtype=np.int64).reshape(-1, 3)


def _as_one(column: Ints, mass: Floats, unsure: Ints) -> Ints:
    """The column that stands for each one's group, `[R, C]`; moves the masses there."""
    group = np.tile(np.arange(column.shape[1]), (len(column), 1))
    for boundary, one, other in unsure.tolist():
        places = [np.flatnonzero(column[boundary] == cell) for cell in (one, other)]
        if all(len(place) for place in places):
            first, second = sorted(int(group[boundary, place[0]]) for place in places)
            group[boundary, group[boundary] == second] = first
    rows = np.arange(len(column))[:, None]
    sums = np.zeros_like(mass)
    np.add.at(sums, (rows, group), mass)
    mass[:] = sums
    return group


def _reach(plan: CoveringPlan, rows: TeacherRows, segment_t: Ints) -> Callable[[Ints, Ints], Floats]:
    """Log mass of the teacher's own reading of the text up to a boundary, from the start of its segment."""
    before = np.concatenate([[0.0], np.cumsum(rows.text)])
    running = np.concatenate([[0.0], np.cumsum(rows.tail)])
    branch_start = np.arange(len(rows.tail)) - plan.branch.depth
    tails = running[1:] - running[branch_start]

    def reach(main: Ints, last: Ints) -> Floats:
        found = before[main] - before[np.searchsorted(segment_t, segment_t[main])] if len(main) else np.zeros(0)
        return found + np.where(last >= 0, tails[np.maximum(last, 0)], 0.0) if len(tails) else found

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


def _refused(
    plan: CoveringPlan,
    cells: CellMap,
    neighbours: Neighbours,
    ids_s: Ints,
    boundary: Ints,
    cell: Ints,
    mass: Floats,
) -> NDArray[np.bool_]:
    """Which cells hold no token that the student's tokenizer would write behind the one before, `[entries]`."""
    previous = np.where(plan.previous >= 0, ids_s[np.maximum(plan.previous, 0)], -1)[boundary]
    refused = np.zeros(len(cell), dtype=np.bool_)
    looked = np.flatnonzero((previous >= 0) & (mass > _NEGLIGIBLE))
    pairs = list(zip(previous[looked].tolist(), cell[looked].tolist(), strict=True))
    doubtful = looked[~np.array(neighbours.allowed(pairs), dtype=np.bool_)] if len(looked) else looked
    for at in doubtful.tolist():
        one, named = int(previous[at]), int(cell[at])
        others = cells.members[cells.begin[named] : cells.begin[named + 1]]
        others = others[others != named][:_MEMBERS]
        refused[at] = not any(neighbours.allowed([(one, int(other)) for other in others]))
    return refused


def _written_token(
    plan: CoveringPlan, cells: CellMap, ids_s: Ints, column: Ints, mass: Floats, group: Ints, log_prefix: Floats
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
        if len(at) and (cells.size[cell] > 1 or (group[r] == group[r, at[0]]).sum() > 1):
            split[r] = group[r, at[0]]
            ratio = np.exp(min(log_prefix[plan.following[r]] - log_prefix[r], 0.0))
            own[r] = min(ratio, mass[r, split[r]])
    return split, own
