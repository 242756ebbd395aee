"""Places of the text where the teacher could have a boundary, though neither side has one there.

Behind "aab" the teacher's next token may be the rest of "ba", which began behind its "a", "a": a reading that neither
its tokens for the whole text nor those for "aab" show. Where such a place holds some of the mass, the teacher is asked
about it, too.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from diglot.batches import Written
from diglot.objectives.base import Encode
from diglot.objectives.covering_plan import CoveringPlan, EarlierRows, branches_to, pairs_from
from diglot.objectives.covering_target import TeacherRows, prefix_masses
from diglot.objectives.tail import TailTokens
from diglot.vocabulary import Vocabulary

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
_SOME = 1e-2  # of the mass of the next boundary: a place that can hold less is not asked about


def inner_places(plan: CoveringPlan, rows: TeacherRows, prefix: Floats, segment_t: Ints) -> Ints:
    """Where the text is to be cut once more, as places of the ground; `prefix` is the log mass of `plan.prefixes`."""
    ground = plan.ground
    log_prefix, _, _ = prefix_masses(plan, rows, segment_t)
    key_of = np.full(len(segment_t), -1, dtype=np.int64)
    at = np.flatnonzero(ground.main_at >= 0)
    key_of[ground.main_at[at]] = at
    after = np.full(len(ground.row_at) + 1, -1, dtype=np.int64)  # the next boundary that is compared
    for place in range(len(ground.row_at) - 1, -1, -1):
        after[place] = ground.row_at[place] if ground.row_at[place] >= 0 else after[place + 1]
    before = np.concatenate([[0.0], np.cumsum(rows.text)])
    row, key = plan.prefixes.row, key_of[plan.prefixes.row]
    reach = before[row] - before[np.searchsorted(segment_t, segment_t[row])]
    ends = key + plan.prefixes.length
    next_key = np.full(len(segment_t), len(ground.row_at), dtype=np.int64)
    next_key[ground.main_at[at]] = np.append(at[1:], len(ground.row_at))
    stops = np.minimum(
        next_key[row],
        np.append(ground.offset, len(ground.row_at))[np.searchsorted(ground.offset, key, side="right")] - 1,
    )
    to = after[ends]
    heavy = (ends < stops) & (to >= 0)
    heavy &= np.where(to >= 0, reach + prefix - log_prefix[to], -np.inf) > np.log(_SOME)
    places: set[int] = set()
    for low, high in zip(ends[heavy].tolist(), stops[heavy].tolist(), strict=True):
        places.update(range(low, high))
    found = np.array(sorted(places), dtype=np.int64)
    return found[(ground.row_at[found] < 0) & (ground.main_at[found] < 0)]


def with_inner(
    plan: CoveringPlan, written: Written, places: Ints, prefix: Floats, teacher: Vocabulary, encode_t: Encode
) -> tuple[CoveringPlan, TailTokens, Floats]:
    """The plan with branches to `places`, these branches, and the log mass of their first tokens (0 for the others)."""
    ground = plan.ground
    segment = np.searchsorted(ground.offset, places, side="right") - 1
    more, last = branches_to(written, segment, places - ground.offset[segment], encode_t, len(plan.branch.ids))
    known = dict(zip(zip(plan.prefixes.row.tolist(), plan.prefixes.token.tolist(), strict=True), prefix, strict=True))
    first = np.array(
        [
            0.0 if d else known.get((r, i), -np.inf)
            for r, i, d in zip(more.row.tolist(), more.ids.tolist(), more.depth.tolist(), strict=True)
        ]
    )
    usable = last >= 0
    last, key = last[usable], places[usable]
    base = len(plan.branch.ids)
    row = len(written.teacher.ids) + base + last
    pairs = pairs_from(key, row, more.before[last], base + last, ground, teacher)
    join = [np.concatenate([getattr(plan.branch, n), getattr(more, n)]) for n in TailTokens.__dataclass_fields__]
    both = [np.concatenate([getattr(plan.earlier, n), getattr(pairs, n)]) for n in EarlierRows.__dataclass_fields__]
    return replace(plan, branch=TailTokens(*join), earlier=EarlierRows(*both)), more, first
