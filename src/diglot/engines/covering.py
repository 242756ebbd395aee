"""A teacher's named tokens as a distribution over the student's next token, given the text so far.

Where a student token starts, the teacher's next bytes begin with a token behind its reading of the text so far, or are
the rest of a token that began earlier and runs past that place. So each of the teacher's named tokens counts at every
start of a student token that it reaches (Phan et al., arXiv 2410.09303; Vieira et al., arXiv 2412.03719). The objective
`covering` asks the teacher about what the rows of the whole text do not say; here nothing more is asked, and what they
leave open is counted.

Shapes: `N_t` scored teacher tokens, `K` named ids of a row, `R` starts of student tokens, `L` leaves: a named token at
a start that it reaches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count

import numpy as np
from numpy.typing import NDArray

from diglot.batches import Written
from diglot.engines.likeliest import Likeliest
from diglot.objectives.covering_ahead import Leaves, open_leaves
from diglot.objectives.covering_cells import CellMap, Neighbours, Probes
from diglot.objectives.covering_plan import CoveringPlan, Ground, plan_covering
from diglot.rendering import Renderer
from diglot.vocabulary.maps import first_tokens, greedy_tokens

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_NEGLIGIBLE = 1e-4  # of the mass of a start: a leaf of less is not tried against the student's tokenizer
_HOPELESS = 0.99  # of it: where more could not be written, the student's tokens so far are not its tokenizer's own
_SOME = 3e-2  # of it: what can hold less is not looked for, as in the objective
_TRIED = 8  # tokens that run past a start, at most so many
_REMEMBERED = 2**20  # leaves that are tried before what is known about pairs of tokens is let go


class FirstTokens(CellMap):
    """Each student token by itself. Which one a teacher's token begins may depend on what follows: `Probes` tell."""

    def __init__(self, student: Renderer, teacher: Renderer) -> None:
        own, other = self.student, self.teacher = student.vocabulary, teacher.vocabulary
        self.rest, self.first = greedy_tokens(other, own), first_tokens(other, own, student.encoder.encode)
        self.cell = np.where(own.lengths > 0, np.arange(len(own)), -1)
        self.size = (own.lengths > 0).astype(np.int64)
        self.members = np.argsort(self.cell, kind="stable")
        self.begin = np.searchsorted(self.cell[self.members], np.arange(len(own) + 1))


@dataclass(frozen=True)
class Pieces:
    """Named tokens that spell what was written up to a place where none of the written tokens ends, `[P]` each."""

    row: Ints
    token: Ints
    end: Ints  # a place of the ground
    reach: Floats  # log mass up to it


class Covering:
    """Of one pair of sides. Threads may share it."""

    def __init__(self, student: Renderer, teacher: Renderer) -> None:
        self.student, self.teacher = student, teacher
        self.cells = FirstTokens(student, teacher)
        self.probes = Probes(self.cells, student.encoder.encode, teacher.encoder.encode)
        self._tried = 0
        self._neighbours = self._nothing_known()
        self._stops = np.array(sorted(teacher.stop_ids), dtype=np.int64)

    def distribution(self, written: Written, logps: Floats, ids: Ints, top: Floats) -> tuple[Likeliest, Ints]:
        """What the teacher expects next at each start of a student token that can be compared.

        Args:
            logps: `[N_t]` nats, of the written tokens; stop as one event.
            ids, top: `[N_t, K]`, the ids that each row names and their log-probs; -1 and -inf where there are fewer.

        Returns:
            The distribution, at most `K` ids of each start, and the student tokens that begin there, `[R]`.
        """
        plan = plan_covering(written, self.student.vocabulary, self.teacher.vocabulary, self.teacher.encoder.encode)
        before = np.concatenate([[0.0], np.cumsum(logps)])  # masses at a start are in units of what is written up to it
        least = np.where(np.isfinite(top), top, 0.0).min(-1, initial=0.0)
        stop = np.where(written.teacher.stop, np.exp(logps), np.exp(_only(top, np.isin(ids, self._stops))).sum(-1))
        ids, top = _with_written(ids, top, written.teacher.ids, logps)
        leaves, pieces = self._leaves(plan, before, ids, top)
        known_s, known_t = self._known(len(leaves.mass))
        own = plan.last < 0
        ended, sure = _ended(plan, before, ids, top, least)
        whole = own + ended + np.bincount(leaves.boundary, leaves.mass * (leaves.consumed > 0), minlength=plan.items)
        beside = self._beside(plan, pieces, before, whole, known_t)
        whole, ended, sure = whole + beside, ended + beside, sure & (beside == 0)
        lost = ~(np.isfinite(whole) & (whole > 0))  # behind a token that the teacher holds impossible
        leaves = leaves.at(np.flatnonzero(~lost[leaves.boundary]))
        whole = np.where(lost, 1.0, whole)
        prefix = np.where(sure & ~lost, before[plan.main] + np.log(whole), np.nan)
        leaves = replace(leaves, mass=leaves.mass / whole[leaves.boundary])
        stop = np.where(own & ~lost, stop[plan.main], 0.0) / whole
        ended = np.where(lost, 1.0, ended / whole)
        result = self._named(plan, written.student.ids, leaves, stop, ended, prefix, known_s, top.shape[1] - 1)
        return result, plan.student

    def _leaves(self, plan: CoveringPlan, before: Floats, ids: Ints, top: Floats) -> tuple[Leaves, Pieces]:
        """Named tokens at the starts that they reach: all their bytes before it are the text's, and some follow; and
        those that are the text's to their end, which is no end of the written tokens."""
        table, ground = self.teacher.vocabulary, plan.ground
        known = (ids >= 0) & (ids < len(table)) & ~np.isin(ids, self._stops)
        lengths = np.where(known, table.lengths[np.where(known, ids, 0)], 0)
        begins = np.flatnonzero(ground.main_at >= 0)
        key_of = np.full(len(ids), -1, dtype=np.int64)
        key_of[ground.main_at[begins]] = begins
        row, k = np.nonzero((lengths > 0) & (key_of >= 0)[:, None])
        text, data = _with_ends(ground), table.data.astype(np.int16)
        reached: list[tuple[Ints, Ints, Ints, Ints]] = []
        spelt: list[tuple[Ints, Ints, Ints]] = []
        for depth in count():
            to = ground.row_at[key_of[row] + depth]
            hit = to >= 0
            reached.append((to[hit], row[hit], k[hit], np.full(int(hit.sum()), depth)))
            on = text[key_of[row] + depth] == data[table.offsets[ids[row, k]] + depth]
            row, k = row[on], k[on]
            ends = lengths[row, k] == depth + 1
            inside = ends & (ground.main_at[key_of[row] + depth + 1] < 0)
            spelt.append((row[inside], k[inside], key_of[row[inside]] + depth + 1))
            row, k = row[~ends], k[~ends]
            if not len(row):
                break
        to, row, k, consumed = (np.concatenate(x) for x in zip(*reached, strict=True))
        mass = np.exp(before[row] + top[row, k] - before[plan.main[to]])
        leaves = Leaves(to, row, ids[row, k], consumed, self.cells.of_leaves(ids[row, k], consumed), mass)
        row, k, end = (np.concatenate(x) for x in zip(*spelt, strict=True))
        return leaves, Pieces(row, ids[row, k], end, before[row] + top[row, k])

    def _beside(self, plan: CoveringPlan, pieces: Pieces, before: Floats, whole: Floats, known: Neighbours) -> Floats:
        """Mass, at most, of the texts in which a token that runs past a start begins where none of the written ones
        does, `[R]`: no row was read there. Where it can be a small part of the mass it is not counted."""
        ground, trie, lengths = plan.ground, self.teacher.vocabulary.trie, self.teacher.vocabulary.lengths
        first = _first_of_branches(plan)
        of: dict[tuple[int, int], float] = {}  # piece and start -> mass
        tried: list[tuple[tuple[int, int], tuple[int, int]]] = []
        for on, depth, node in trie.walk(ground.data, *ground.span(pieces.end)) if len(ground.data) else ():
            to = ground.row_at[pieces.end[on] + depth]
            mass = np.where(to >= 0, np.exp(np.minimum(pieces.reach[on] - before[plan.main[to]], 0.0)), 0.0)
            counted = (first[to] == np.column_stack([pieces.row[on], pieces.token[on]])).all(-1)
            for h in np.flatnonzero((mass > _SOME * whole[to]) & ~counted).tolist():
                longer = trie.sorted_ids[trie.low[node[h]] : trie.high[node[h]]]
                longer = longer[lengths[longer] > depth]
                some = longer[np.unique(np.linspace(0, len(longer) - 1, min(len(longer), _TRIED)).astype(np.int64))]
                of[int(on[h]), int(to[h])] = float(mass[h])
                tried += [((int(on[h]), int(to[h])), (int(pieces.token[on[h]]), i)) for i in some.tolist()]
        allowed = known.allowed([pair for _, pair in tried])
        beside = np.zeros(plan.items)
        for one in {one for (one, _), yes in zip(tried, allowed, strict=True) if yes}:
            beside[one[1]] += of[one]
        return beside

    def _named(
        self,
        plan: CoveringPlan,
        ids_s: Ints,
        leaves: Leaves,
        stop: Floats,
        ended: Floats,
        prefix: Floats,
        neighbours: Neighbours,
        most: int,
    ) -> Likeliest:
        """From leaves to the student's ids; `stop` and `ended` are shares of a start's mass, `prefix` its logarithm."""
        previous = np.where(plan.previous >= 0, ids_s[np.maximum(plan.previous, 0)], -1)
        is_open, refused = (np.zeros(len(leaves.mass), dtype=np.bool_) for _ in range(2))
        is_open[open_leaves(leaves, previous, self.cells, self.probes, neighbours)] = True
        tried = np.flatnonzero((leaves.mass > _NEGLIGIBLE) & (leaves.cell >= 0) & ~is_open)
        refused[tried] = ~neighbours.some_allowed(previous[leaves.boundary[tried]], leaves.cell[tried], self.cells)
        lost = np.bincount(leaves.boundary, leaves.mass * refused, minlength=plan.items)
        hopeless = lost > _HOPELESS
        share = np.where(hopeless, 1.0, 1 - lost)
        kept = np.flatnonzero(~refused | hopeless[leaves.boundary])
        leaves, is_open = leaves.at(kept), is_open[kept]
        leaves = replace(leaves, mass=leaves.mass / share[leaves.boundary])
        vague = np.bincount(leaves.boundary, leaves.mass * is_open, minlength=plan.items) + ended / share
        settled = np.bincount(leaves.boundary, is_open, minlength=plan.items) == 0
        behind = np.where(settled, prefix + np.log(share), np.nan)  # of what is open, a part may not be writable
        rows, ids, mass, cleared = self._written_tokens(plan, ids_s, leaves, is_open, prefix + np.log(share), behind)
        named, stops = np.flatnonzero(~is_open & (leaves.cell >= 0)), np.flatnonzero(stop > 0)
        parts = (
            (leaves.boundary[named], leaves.cell[named], leaves.mass[named]),
            (rows, ids, mass),
            (stops, np.full(len(stops), self.student.stop_id), (stop / share)[stops]),
        )
        row, name, mass = (np.concatenate(x) for x in zip(*parts, strict=True))
        ids, logps, residual = likeliest_of(row, name, mass, plan.items, most)
        return Likeliest(ids, logps, residual, np.clip(vague - cleared, 0.0, residual))

    def _written_tokens(
        self, plan: CoveringPlan, ids_s: Ints, leaves: Leaves, is_open: Bools, prefix: Floats, behind: Floats
    ) -> tuple[Ints, Ints, Floats, Floats]:
        """The written token's own mass where it shares its cell, or what begins it is open: that of the texts so far
        with it over that of those before it, `prefix` and `behind` of each start, NaN where it is not known.

        Returns rows, ids and what is to be added to the mass of each, and what of the open mass this is, `[R]`.
        """
        y = ids_s[plan.student]
        cell = self.cells.cell[y]
        mine = leaves.cell == cell[leaves.boundary]
        vague, named = (
            np.bincount(leaves.boundary, leaves.mass * (mine & which), minlength=plan.items)
            for which in (is_open, ~is_open)
        )
        behind = np.where(plan.following >= 0, behind[np.maximum(plan.following, 0)], np.nan)
        with np.errstate(invalid="ignore"):
            mass = np.exp(np.minimum(behind - prefix, 0.0))
        known = np.isfinite(mass) & (cell >= 0)
        names = cell == y  # the cell is called after it: what is named already is its own
        mass = np.where(known, np.minimum(mass, vague + named), 0.0)
        from_open = np.where(known, np.clip(np.where(names, mass - named, mass), 0.0, vague), 0.0)
        from_named = np.where(names, 0.0, mass - from_open)
        taken, moved = np.flatnonzero(from_open + from_named > 0), np.flatnonzero(from_named > 0)
        rows, ids = np.concatenate([taken, moved]), np.concatenate([y[taken], cell[moved]])
        return rows, ids, np.concatenate([(from_open + from_named)[taken], -from_named[moved]]), from_open

    def _known(self, tried: int) -> tuple[Neighbours, Neighbours]:
        """What is known about pairs of tokens of either side, begun anew before it takes too much memory."""
        if self._tried > _REMEMBERED:
            self._tried, self._neighbours = 0, self._nothing_known()
        self._tried += tried
        return self._neighbours

    def _nothing_known(self) -> tuple[Neighbours, Neighbours]:
        student, teacher = (Neighbours(side.vocabulary, side.encoder.encode) for side in (self.student, self.teacher))
        return student, teacher


def _only(logps: Floats, which: Bools) -> Floats:
    return np.where(which, logps, -np.inf)


def _with_written(ids: Ints, top: Floats, written: Ints, logps: Floats) -> tuple[Ints, Floats]:
    """One more column for the written token, where it is not among those that are named."""
    new = ~(ids == written[:, None]).any(-1)
    more = np.where(new, written, -1), np.where(new, logps, -np.inf)
    return np.column_stack([ids, more[0]]), np.column_stack([top, more[1]])


def _with_ends(ground: Ground) -> NDArray[np.int16]:
    """The bytes of the turns with -1 behind each, so that no token runs from one into the next."""
    text = np.full(len(ground.row_at), -1, dtype=np.int16)
    place = np.arange(len(ground.data)) + np.repeat(np.arange(len(ground.lengths)), ground.lengths)
    text[place] = ground.data
    return text


def _first_of_branches(plan: CoveringPlan) -> Ints:
    """Row and token with which the teacher's reading of the text so far leaves that of the whole text, `[R, 2]`; -1
    where it does not."""
    first = np.full((plan.items, 2), -1, dtype=np.int64)
    over = np.flatnonzero(plan.last >= 0)
    if len(over):
        at = plan.last[over] - plan.branch.depth[plan.last[over]]
        first[over] = np.column_stack([plan.branch.row[at], plan.branch.ids[at]])
    return first


def _ended(plan: CoveringPlan, before: Floats, ids: Ints, top: Floats, least: Floats) -> tuple[Floats, Bools]:
    """Mass of the texts in which the teacher's reading of the text so far ends at the start, `[R]`: 0 where the reading
    of the whole text does. Sure if it is one token that its row names; otherwise an upper bound: that of the first
    token, or of the last that is named."""
    mass, sure = np.zeros(plan.items), np.ones(plan.items, dtype=np.bool_)
    over = np.flatnonzero(plan.last >= 0)
    row, token = _first_of_branches(plan)[over].T
    here = ids[row] == token[:, None]
    named = here.any(-1)
    logp = np.where(named, _only(top[row], here).max(-1, initial=-np.inf), least[row])
    mass[over] = np.exp(before[row] + logp - before[plan.main[over]])
    sure[over] = named & (plan.branch.depth[plan.last[over]] == 0) if len(over) else True
    return mass, sure


def likeliest_of(row: Ints, name: Ints, mass: Floats, rows: int, most: int) -> tuple[Ints, Floats, Floats]:
    """The `most` ids of each row with the most mass, summed over equal ones, as `Likeliest` holds them.

    Args:
        row, name, mass: `[n]` each, in any order; masses of one id and row may be negative, their sum is not.
    """
    width = int(name.max(initial=0)) + 1
    key, place = np.unique(row * width + name, return_inverse=True)
    total = np.bincount(place, mass, minlength=len(key))
    row, name = key // width, key % width
    order = np.lexsort((-total, row))
    row, name, total = row[order], name[order], total[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    kept = (rank < most) & (total > 0)
    ids, masses = np.full((rows, most), -1, dtype=np.int64), np.zeros((rows, most))
    ids[row[kept], rank[kept]], masses[row[kept], rank[kept]] = name[kept], total[kept]
    over = np.maximum(masses.sum(-1, keepdims=True), 1.0)  # rounding
    with np.errstate(divide="ignore"):
        return ids, np.log(masses / over), np.clip(1.0 - (masses / over).sum(-1), 0.0, 1.0)
