"""Divergence on the teacher's likeliest tokens and one cell for the rest: all that a teacher of top-k can be asked."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diglot.batches import Written
from diglot.errors import ConfigError
from diglot.objectives.base import RowObjective, at_least_float32, check_range
from diglot.objectives.divergences import generalized_jsd
from diglot.objectives.levels import Level
from diglot.objectives.masses import FLOOR
from diglot.objectives.pair import Pair
from diglot.objectives.scores import Rows, Scores, Values
from diglot.objectives.strict import check_columns


class TopK(RowObjective):
    """Generalised JSD of two coarsened distributions, in nats per row of a one-to-one pair; by default KL(student ||
    teacher).

    Cells of a row: each of the teacher's `k` likeliest tokens that the student has too; stop, if a stop id is among the
    `k`; and one for everything else on both sides. The partition is a constant, so by the data-processing inequality
    the value is at most the divergence of the whole distributions, and zero if and only if the coarsened
    distributions are equal.

    Exact but for one thing: of the teacher's stop set only the ids among the `k` are in the stop cell. Another holds
    at most the least of the `k` masses, so the teacher's distribution differs from the exact coarsened one by a total
    variation of at most (stop ids not seen) x (that mass), which the metric `stop_bound` reports. The teacher's rest
    is 1 minus the others' sum; it counts as at least 1e-8.

    Args:
        k: how many of the teacher's tokens; vLLM's servers give 20 unless told otherwise.
        beta: in [0, 1], 0 forward KL(teacher || student), 1 reverse.
    """

    name = "top_k"
    needs = Level.TOP_K

    def __init__(self, pair: Pair, *, k: int = 16, beta: float = 1.0) -> None:
        super().__init__(pair)
        check_range("beta", beta, 0.0, 1.0)
        if k < 1:
            raise ConfigError(f"k={k} reads nothing of the teacher: choose at least 1.")
        check_columns(pair)
        self.k = self.top = min(k, pair.size_t)
        self.beta = beta
        self.twin = torch.full((pair.size_t,), -1, dtype=torch.int64)  # the student's id of each teacher id
        self.twin[pair.shared_t] = pair.shared_s
        self.is_stop = torch.zeros(pair.size_t, dtype=torch.bool).index_fill(0, pair.stop_t, True)

    def extra(self, rows: Rows, written: Written, scores: Scores) -> dict[str, Tensor]:
        """The teacher's likeliest ids of each row and their log-probs, `[R, k]`."""
        ids, logps = scores.teacher_top(rows.teacher, self.k)
        return {"top_ids": ids, "top_logps": logps}

    def __call__(self, logits_s: Tensor, logits_t: Tensor | None, **inputs: Tensor) -> Values:
        ids, logps = inputs["top_ids"], at_least_float32(inputs["top_logps"])
        named = ids >= 0
        twin = torch.where(named, self.twin[ids.clamp(min=0)], -1)
        stop = named & self.is_stop[ids.clamp(min=0)]
        shared = (twin >= 0) & ~stop
        has_stop = stop.any(-1, keepdim=True)
        cells_t = torch.where(shared, logps, -math.inf)
        stop_t = torch.where(stop, logps, -math.inf).logsumexp(-1, keepdim=True)
        known = torch.cat([cells_t, stop_t], dim=-1)
        rest_t = (1 - known.exp().sum(-1, keepdim=True)).clamp(min=FLOOR).log()
        loss = generalized_jsd(
            self._student(logits_s, twin, shared, has_stop), torch.cat([known, rest_t], dim=-1), self.beta
        )
        least = torch.where(named, logps, math.inf).amin(-1).exp()
        bound = (len(self.pair.stop_t) - stop.sum(-1)) * least * has_stop[:, 0]
        return Values(loss, {"mass_t": known.exp().sum(-1), "stop_bound": bound})

    def _student(self, logits: Tensor, twin: Tensor, shared: Tensor, has_stop: Tensor) -> Tensor:
        """The student's log-probabilities of the same cells, `[R, k + 2]`; -inf for cells that a row has not."""
        logits = at_least_float32(logits)
        # Ids that are not shared mark a column behind the last one.
        marked = torch.where(shared, twin, logits.shape[1])
        taken = logits.new_zeros(len(logits), logits.shape[1] + 1, dtype=torch.bool).scatter_(1, marked, True)[:, :-1]
        stops = torch.zeros_like(taken).index_fill(-1, self.pair.stop_s, True) & has_stop
        cells = torch.where(shared, logits.gather(-1, twin.clamp(min=0)), -math.inf)
        stop = torch.where(has_stop, logits[:, self.pair.stop_s].logsumexp(-1, keepdim=True), -math.inf)
        rest = logits.masked_fill(taken | stops, -math.inf).logsumexp(-1, keepdim=True)
        return torch.cat([cells, stop, rest], dim=-1) - logits.logsumexp(-1, keepdim=True)
