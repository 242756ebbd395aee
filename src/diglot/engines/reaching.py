"""Which of the teacher's named tokens reach which start of a student token, and with what mass.

Masses at a start are in units of that of the teacher's written tokens up to its own token there (`plan.main`).
Shapes: `N_t` scored teacher tokens, `K` named ids of a row, `R` starts of student tokens, `L` leaves: a named token at
a start that it reaches.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count, islice

import numpy as np
from numpy.typing import NDArray

from diglot.arrays import Bools, Floats, Ints
from diglot.objectives.covering_ahead import Leaves
from diglot.objectives.covering_cells import CellMap, Neighbours
from diglot.objectives.covering_plan import Boundaries, Ground
from diglot.vocabulary import Vocabulary

_SOME = 3e-2  # of a start's mass: what can hold less is not looked for, as in the objective
_LARGE = 50.0  # nats: so many times the mass of the written tokens is all there is
_TRIED = 8  # tokens that run past a start, at most so many


@dataclass(frozen=True)
class Named:
    """What the teacher's rows say."""

    ids: Ints  # [N_t, K] -1 where there are fewer
    logps: Floats  # [N_t, K] -inf there
    least: Floats  # [N_t] no id that is not named has more
    before: Floats  # [N_t + 1] log mass of the written tokens before each

    @classmethod
    def of(cls, ids: Ints, logps: Floats, written: Ints, own: Floats) -> Named:
        """With one more column for the written tokens `[N_t]`, whose log-probs are known, where they are not named."""
        least = np.where(np.isfinite(logps), logps, 0.0).min(-1, initial=0.0)
        new = ~(ids == written[:, None]).any(-1)
        ids = np.column_stack([ids, np.where(new, written, -1)])
        logps = np.column_stack([logps, np.where(new, own, -np.inf)])
        return cls(ids, logps, least, np.concatenate([[0.0], np.cumsum(own)]))

    def of_only(self, which: Ints) -> Floats:
        """Mass of some ids in each row, `[N_t]`."""
        mass: Floats = np.exp(np.where(np.isin(self.ids, which), self.logps, -np.inf)).sum(-1)
        return mass


@dataclass(frozen=True)
class Pieces:
    """Named tokens that spell what was written up to a place where none of the written tokens ends, `[P]` each."""

    row: Ints
    token: Ints
    end: Ints  # a place of the ground
    reach: Floats  # log mass up to it


def find_leaves(
    plan: Boundaries, named: Named, teacher: Vocabulary, stops: Ints, cells: CellMap
) -> tuple[Leaves, Pieces]:
    """Named tokens at the starts that they reach: all their bytes before it are the text's, and some follow; and
    those that are the text's to their end, which is no end of the written tokens."""
    ids, before, table, ground = named.ids, named.before, teacher, plan.ground
    known = (ids >= 0) & (ids < len(table)) & ~np.isin(ids, stops)
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
    mass = np.exp(before[row] + named.logps[row, k] - before[plan.main[to]])
    leaves = Leaves(to, row, ids[row, k], consumed, cells.of_leaves(ids[row, k], consumed), mass)
    row, k, end = (np.concatenate(x) for x in zip(*spelt, strict=True))
    return leaves, Pieces(row, ids[row, k], end, before[row] + named.logps[row, k])


class Beyond:
    """Does the teacher's tokenizer write one of the tokens that go on like the text behind another one?"""

    def __init__(self, teacher: Vocabulary, neighbours: Neighbours) -> None:
        self.teacher, self.neighbours = teacher, neighbours
        self._known: dict[tuple[int, int], bool] = {}

    def any_behind(self, token: Ints, node: Ints, depth: Ints) -> Bools:
        """For each token and node of the trie, of `depth` bytes: of tokens that are longer, a few are tried, `[n]`."""
        keys = list(zip(token.tolist(), node.tolist(), strict=True))
        unknown = {key: d for key, d in zip(keys, depth.tolist(), strict=True) if key not in self._known}
        if unknown:
            pairs = {key: [(key[0], i) for i in self._longer(key[1], d)] for key, d in unknown.items()}
            answers = iter(self.neighbours.allowed([pair for of_key in pairs.values() for pair in of_key]))
            for key, of_key in pairs.items():
                self._known[key] = any(list(islice(answers, len(of_key))))
        return np.array([self._known[key] for key in keys], dtype=np.bool_)

    def _longer(self, node: int, depth: int) -> list[int]:
        trie = self.teacher.trie
        longer = trie.sorted_ids[trie.low[node] : trie.high[node]]
        longer = longer[self.teacher.lengths[longer] > depth]
        which = np.unique(np.linspace(0, len(longer) - 1, min(len(longer), _TRIED)).astype(np.int64))
        ids: list[int] = longer[which].tolist()
        return ids


def mass_beside(plan: Boundaries, named: Named, pieces: Pieces, whole: Floats, beyond: Beyond) -> Floats:
    """Mass, at most, of the texts in which a token that runs past a start begins where none of the written ones
    does, `[R]`: no row was read there. Where it can be a small part of the mass it is not counted.

    Args:
        whole: `[R]`, the mass of each start that is known.
        beyond: what the teacher's tokenizer writes side by side.
    """
    ground, first = plan.ground, _first_of_branches(plan)
    parts = [(*(np.zeros(0, dtype=np.int64) for _ in range(4)), np.zeros(0))]
    walked = beyond.teacher.trie.walk(ground.data, *ground.span(pieces.end)) if len(ground.data) else ()
    for on, depth, node in walked:
        to = ground.row_at[pieces.end[on] + depth]
        hit = to >= 0
        on, node, to = on[hit], node[hit], to[hit]
        mass = np.exp(np.minimum(pieces.reach[on] - named.before[plan.main[to]], _LARGE))
        counted = (first[to] == np.column_stack([pieces.row[on], pieces.token[on]])).all(-1)
        some = (mass > _SOME * whole[to]) & ~counted
        parts.append((to[some], pieces.token[on[some]], node[some], np.full(int(some.sum()), depth), mass[some]))
    to, token, node, depths, mass = (np.concatenate(x) for x in zip(*parts, strict=True))
    beside = np.bincount(to, mass * beyond.any_behind(token, node, depths), minlength=plan.items)
    return beside.astype(np.float64)


def _first_of_branches(plan: Boundaries) -> Ints:
    """Row and token with which the teacher's reading of the text so far leaves that of the whole text, `[R, 2]`; -1
    where it does not."""
    first = np.full((plan.items, 2), -1, dtype=np.int64)
    over = np.flatnonzero(plan.last >= 0)
    if len(over):
        at = plan.last[over] - plan.branch.depth[plan.last[over]]
        first[over] = np.column_stack([plan.branch.row[at], plan.branch.ids[at]])
    return first


def mass_ended(plan: Boundaries, named: Named) -> tuple[Floats, Bools]:
    """Mass of the texts in which the teacher's reading of the text so far ends at the start, `[R]`: 0 where the reading
    of the whole text does. Sure if it is one token that its row names; otherwise an upper bound: that of the first
    token, or of the last that is named."""
    mass, sure = np.zeros(plan.items), np.ones(plan.items, dtype=np.bool_)
    over = np.flatnonzero(plan.last >= 0)
    row, token = _first_of_branches(plan)[over].T
    here = named.ids[row] == token[:, None]
    logp = np.where(here.any(-1), np.where(here, named.logps[row], -np.inf).max(-1, initial=-np.inf), named.least[row])
    mass[over] = np.exp(named.before[row] + logp - named.before[plan.main[over]])
    sure[over] = here.any(-1) & (plan.branch.depth[plan.last[over]] == 0) if len(over) else True
    return mass, sure


def _with_ends(ground: Ground) -> NDArray[np.int16]:
    """The bytes of the turns with -1 behind each, so that no token runs from one into the next."""
    text = np.full(len(ground.row_at), -1, dtype=np.int16)
    place = np.arange(len(ground.data)) + np.repeat(np.arange(len(ground.lengths)), ground.lengths)
    text[place] = ground.data
    return text
