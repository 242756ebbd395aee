"""Places of the text where the teacher could have a boundary, though neither side has one there.

Behind "aab" the teacher's next token may be the rest of "ba", which began behind its "a", "a": a reading that neither
its tokens for the whole text nor those for "aab" show. Where such a place holds some of the mass, the teacher is asked
about it, too.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diglot.batches import Written
from diglot.objectives.covering_plan import CoveringPlan, EarlierRows, Ground, branches_to, pairs_from
from diglot.objectives.covering_rows import NONE, Table, read_rows
from diglot.objectives.covering_target import TeacherRows, prefix_masses, reach_of
from diglot.objectives.scores import Scores
from diglot.objectives.tail import TailTokens
from diglot.vocabulary import Speller, Vocabulary

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
_TAIL, _PAIRS = TailTokens.__dataclass_fields__, EarlierRows.__dataclass_fields__
_TRIED = 8  # tokens that run past a boundary, at most so many
_SOME = 3e-2  # of the mass of the next boundary: a place that can hold less is not asked about
_FREQUENT = 2**13  # ids below this are those of the most frequent tokens, in the order in which they were learnt


@np.errstate(invalid="ignore")
def _heavy_places(plan: CoveringPlan, rows: TeacherRows, prefix: Floats, log_prefix: Floats, segment_t: Ints) -> Ints:
    """Where a token of the teacher may end with some of the mass, as places of the ground."""
    ground, prefixes = plan.ground, plan.prefixes
    begins, compared = np.flatnonzero(ground.main_at >= 0), np.flatnonzero(ground.row_at >= 0)
    if not len(begins) or not len(compared):
        return np.zeros(0, dtype=np.int64)
    key_of = np.full(len(segment_t), -1, dtype=np.int64)
    key_of[ground.main_at[begins]] = begins
    key = key_of[prefixes.row]
    text_end = (ground.offset + ground.lengths)[np.searchsorted(ground.offset, key, side="right") - 1]
    low = key + prefixes.length
    high = np.minimum(np.append(begins, len(ground.row_at))[np.searchsorted(begins, key, side="right")], text_end)
    next_at = np.append(compared, len(ground.row_at))[np.searchsorted(compared, low)]
    inside = np.flatnonzero((low < high) & (next_at <= text_end))
    before = np.concatenate([[0.0], np.cumsum(rows.text)])
    row = prefixes.row[inside]
    reach = before[row] - before[np.searchsorted(segment_t, segment_t[row])]
    heavy = inside[reach + prefix[inside] - log_prefix[ground.row_at[next_at[inside]]] > np.log(_SOME)]
    places: set[int] = set()
    for one, other in zip(low[heavy].tolist(), high[heavy].tolist(), strict=True):
        places.update(range(one, other))
    sorted_places = np.array(sorted(places), dtype=np.int64)
    return sorted_places[(ground.row_at[sorted_places] < 0) & (ground.main_at[sorted_places] < 0)]


def with_inner(
    plan: CoveringPlan,
    rows: TeacherRows,
    prefix: Floats,
    scores: Scores,
    teacher: Vocabulary,
    spell_t: Speller,
    table: Table,
) -> tuple[CoveringPlan, TeacherRows]:
    """The plan and its rows with those behind places that hold some of the mass. `prefix`: log-probs of
    `plan.prefixes`."""
    segment_t, first = scores.written.teacher.segment, len(scores.written.teacher.ids) + len(plan.branch.ids)
    known = dict(zip(zip(plan.prefixes.row.tolist(), plan.prefixes.token.tolist(), strict=True), prefix, strict=True))

    def begun(tail: TailTokens) -> Floats:
        """Log-probs of the tokens that stand first in their branches."""
        pairs = zip(tail.row.tolist(), tail.ids.tolist(), strict=True)
        return np.array([known.get(one, -np.inf) for one in pairs])

    log_prefix, _, _ = prefix_masses(plan, rows, segment_t)
    places = _heavy_places(plan, rows, prefix, log_prefix, segment_t)
    places, more, last = _branches(plan, places, scores.written, teacher, spell_t)

    def could_hold_some(behind: Tensor | None = None) -> Ints:
        """Which of the places, by what their branches begin with and, if given, a few columns of the rows behind."""
        pairs = _new_pairs(plan, places, last, more, first, teacher)
        at = pairs.last - len(plan.branch.ids)
        most = reach_of(plan, rows, segment_t)(pairs.main, np.full(len(at), -1)) - log_prefix[pairs.to]
        most += begun(more)[at - more.depth[at]]  # what stands behind these first tokens can only take from it
        if behind is not None:
            most += _at_most(pairs, behind, first, scores, table)
        return np.flatnonzero(np.isin(last, at[~(most < np.log(_SOME))]))

    if len(places):
        some = could_hold_some()
        places, (more, last) = places[some], more.ending_at(last[some], first)
    hidden = scores.teacher_behind(more)
    if len(places) and hidden.is_cpu and table.sorted_ids.is_cpu:  # elsewhere to wait takes longer than the rows
        some = could_hold_some(hidden)
        tokens = np.flatnonzero(np.isin(np.cumsum(more.depth == 0) - 1, some))
        places, (more, last), hidden = places[some], more.ending_at(last[some], first), hidden[torch.from_numpy(tokens)]
    if len(places):
        pairs = _new_pairs(plan, places, last, more, first, teacher)
        deeper = np.flatnonzero(more.depth)
        behind = read_rows(scores.teacher_log_probs(hidden), more.row[deeper], more.ids[deeper], pairs, first, table)
        tail = begun(more)
        tail[deeper] = behind.single
        branch = TailTokens(*(np.concatenate([getattr(plan.branch, n), getattr(more, n)]) for n in _TAIL))
        earlier = EarlierRows(*(np.concatenate([getattr(plan.earlier, n), getattr(pairs, n)]) for n in _PAIRS))
        plan = replace(plan, branch=branch, earlier=earlier)
        rows = TeacherRows(rows.text, np.concatenate([rows.tail, tail]), rows.read.with_more(behind))
    # A target must not depend on whether a place with hardly any mass was found, that is, on what comes later.
    log_prefix, _, start = prefix_masses(plan, rows, segment_t)
    with np.errstate(invalid="ignore"):
        light = start + rows.read.range_total - log_prefix[plan.earlier.to] < np.log(_SOME)
    return plan, replace(rows, read=rows.read.without(plan.earlier.extra & light))


def _branches(
    plan: CoveringPlan, places: Ints, written: Written, teacher: Vocabulary, spell_t: Speller
) -> tuple[Ints, TailTokens, Ints]:
    """Those places behind which the teacher could write a token that runs past the next boundary, the branches to
    them, and where each one's ends."""
    ground, base = plan.ground, len(plan.branch.ids)
    segment = np.searchsorted(ground.offset, places, side="right") - 1
    branch, last, _ = branches_to(written, segment, places - ground.offset[segment], spell_t, teacher, base)
    some = np.flatnonzero(_run_past(ground, places, last, branch, teacher, spell_t))
    return places[some], *branch.ending_at(last[some], len(written.teacher.ids) + base)


def _new_pairs(
    plan: CoveringPlan, places: Ints, last: Ints, branch: TailTokens, first: int, teacher: Vocabulary
) -> EarlierRows:
    """Of rows behind branches that end at places, those pairs that are not known yet."""
    end = len(plan.branch.ids) + last
    pairs = pairs_from(places, first + last, branch.before[last], end, plan.ground, teacher)
    stride = int(max(plan.earlier.consumed.max(initial=0), pairs.consumed.max(initial=0))) + 1
    known = plan.earlier.to * stride + plan.earlier.consumed
    return pairs.at(~np.isin(pairs.to * stride + pairs.consumed, known))


def _at_most(pairs: EarlierRows, hidden: Tensor, first: int, scores: Scores, table: Table) -> Floats:
    """What the range of each pair holds in its row at most, as a logarithm.

    Nearly all places hold nothing, and the columns of a few frequent tokens and of the ranges show that: a row is
    shared out among them as if there were no others.
    """
    order = table.sorted_ids
    covered = np.zeros(len(order) + 1, dtype=np.int64)
    np.add.at(covered, pairs.low, 1)
    np.add.at(covered, pairs.high, -1)
    chosen = np.flatnonzero((np.cumsum(covered)[:-1] > 0) | (order.numpy() < _FREQUENT))
    low = np.searchsorted(chosen, pairs.low)
    within = replace(pairs, low=low, high=low + pairs.high - pairs.low)
    ids = order[torch.from_numpy(chosen)]
    columns = Table(ids[:0], ids[:0], torch.arange(len(ids)), 1)
    return read_rows(scores.teacher_log_probs(hidden, ids), NONE, NONE, within, first, columns).range_total


def _run_past(
    ground: Ground, places: Ints, last: Ints, branch: TailTokens, teacher: Vocabulary, spell_t: Speller
) -> NDArray[np.bool_]:
    """Where the teacher's tokenizer would write a token that runs past the next boundary, behind the one before."""
    trie = teacher.trie
    candidates: list[tuple[int, int, int]] = []
    begin, end = ground.span(places)
    for on, depth, node in trie.walk(ground.data, begin, end):
        hit = (ground.row_at[places[on] + depth] >= 0) & (last[on] >= 0)
        for k, n in zip(on[hit].tolist(), node[hit].tolist(), strict=True):
            ids = trie.sorted_ids[trie.low[n] : trie.high[n]]
            ids = ids[teacher.lengths[ids] > depth]
            some = ids[np.unique(np.linspace(0, len(ids) - 1, min(len(ids), _TRIED)).astype(np.int64))]
            candidates += [(k, int(branch.ids[last[k]]), i) for i in some.tolist()]
    read = spell_t([teacher.token(one) + teacher.token(other) for _, one, other in candidates])
    runs_past = np.zeros(len(places), dtype=np.bool_)
    runs_past[[k for (k, *pair), ids in zip(candidates, read, strict=True) if ids == pair]] = True
    return runs_past
