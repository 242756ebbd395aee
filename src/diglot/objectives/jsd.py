"""Generalised JSD over whole vocabularies: for two models with one table of ids."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diglot.errors import ConfigError
from diglot.objectives.base import RowObjective, at_least_float32, check_range
from diglot.objectives.divergences import generalized_jsd
from diglot.objectives.masses import FLOOR
from diglot.objectives.pair import Pair
from diglot.objectives.scores import Rows, Scores, Values


def full_jsd(logits_s: Tensor, logits_t: Tensor, beta: float = 0.5) -> Tensor:
    """`generalized_jsd` in nats, `[R]`, of rows of logits `[R, V_s]` and `[R, V_t]` whose ids mean the same.

    If one table is wider, its surplus columns are padding of the embedding matrix: they are removed before the
    softmax.
    """
    width = min(logits_s.shape[-1], logits_t.shape[-1])
    logp_s, logp_t = (at_least_float32(logits)[..., :width].log_softmax(-1) for logits in (logits_s, logits_t))
    return generalized_jsd(logp_s, logp_t, beta)


def jsd_with_stop(logits_s: Tensor, logits_t: Tensor, stop_s: Tensor, stop_t: Tensor, beta: float = 0.5) -> Tensor:
    """`full_jsd` for sides that end a turn with other ids: stop is one event, the mass of each side's stop set.

    A token that ends only the other side's turn is none of this side's stop and no text either. What both sides give
    to such tokens is one more event; a side that has none counts there as 1e-8.
    """
    width = min(logits_s.shape[-1], logits_t.shape[-1])
    both = torch.cat([stop_s, stop_t]).unique()
    text = torch.ones(width, dtype=torch.bool, device=logits_s.device).index_fill(0, both, False)
    events = []
    for logits, stop in ((logits_s, stop_s), (logits_t, stop_t)):
        logp = at_least_float32(logits)[..., :width].log_softmax(-1)
        other = both[~torch.isin(both, stop)]
        floor = logp.new_full((*logp.shape[:-1], 1), math.log(FLOOR))
        strange = torch.logaddexp(logp[..., other].logsumexp(-1, keepdim=True), floor) if len(other) else floor
        log_masses = torch.cat([logp[..., text], logp[..., stop].logsumexp(-1, keepdim=True), strange], dim=-1)
        events.append(log_masses.log_softmax(-1))
    return generalized_jsd(events[0], events[1], beta)


class JSD(RowObjective):
    """Generalised JSD on the rows of one-to-one pairs (GKD, arXiv 2306.13649).

    `beta` in [0, 1]: 0 forward KL(teacher || student), 1 reverse KL(student || teacher). Ids are compared one by one,
    but for stop where the sides end a turn with other ids: `jsd_with_stop`. Needs one shared table of ids:
    `ConfigError` for vocabularies that differ.
    """

    name = "jsd"

    def __init__(self, pair: Pair, *, beta: float = 0.5) -> None:
        super().__init__(pair)
        if not pair.same:
            raise ConfigError(
                f"objective 'jsd' compares id by id, but the vocabularies differ (student {pair.size_s} ids, teacher "
                f"{pair.size_t}, {len(pair.shared_s)} with equal bytes). Use objective 'strict', which compares the "
                "tokens that both have, or 'span' or 'sequence_kl', which need no shared tokens."
            )
        check_range("beta", beta, 0.0, 1.0)
        self.beta = beta
        self.same_stops = set(pair.stop_s.tolist()) == set(pair.stop_t.tolist())

    def __call__(self, logits_s: Tensor, logits_t: Tensor, **inputs: Tensor) -> Values:
        if self.same_stops:
            return Values(full_jsd(logits_s, logits_t, self.beta))
        return Values(jsd_with_stop(logits_s, logits_t, self.pair.stop_s, self.pair.stop_t, self.beta))

    @property
    def is_single_step(self) -> bool:
        return self.beta == 1

    def explained(self, plan: Rows, scores: Scores) -> Tensor:
        assert scores.rollout is not None
        ratio = torch.full_like(scores.rollout.logp_old, math.nan)
        rows = plan.to(ratio.device)
        ratio[rows.student] = (scores.rollout.logp_t[rows.teacher] - scores.rollout.logp_old[rows.student]).to(ratio)
        return ratio
