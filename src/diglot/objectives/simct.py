"""Divergence on shared tokens, stop, and the unit that was written where the two sides cut the text unlike."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from diglot.arrays import Bools
from diglot.batches.sending import sent
from diglot.objectives.base import RowObjective, at_least_float32
from diglot.objectives.chunks import chunk_sums
from diglot.objectives.divergences import kl
from diglot.objectives.pair import Pair
from diglot.objectives.scores import Rows, Scores, Values
from diglot.objectives.strict import check_columns

if TYPE_CHECKING:
    from diglot.batches import Written


class SimCT(RowObjective):
    """KL(pi_student || pi_teacher) over what may come next at the start of each exact chunk (SimCT, arXiv 2605.07711).

    Candidates of a row: the shared tokens, stop (the mass of the side's stop set), and, where the chunk has more than
    one token on either side, the unit that was written. A candidate's score sigma is its log-prob; the unit's is
    `(1/r) sum log p` over its r tokens on that side, with the student's gradient through each of them. pi is the
    softmax of the scores over the candidates. A unit whose bytes one shared token spells is left out: that text is a
    candidate already, scored as that token. Stop is always the stop column, never a unit.

    It sees the shared part of every distribution at a chunk's start, and of what is not shared only the unit written.
    Because of 1/r a unit's score is no log-prob of its text: pi is no distribution over text, units of many tokens
    look likelier than they are, and where the two sides' r differ it is *not* zero for equal distributions over text
    (nor does zero mean that they are equal). Candidates also overlap: "a" and the unit "ab" both cover text that
    starts with "ab". Renormalised, so mass outside the candidates is not compared. (The paper's formula; its code
    averages raw logits instead.)

    Metrics: `mass_s`, `mass_t`, each side's probability of the shared tokens and stop; `unit`, 1 where there is a unit.
    """

    name = "simct"

    def __init__(self, pair: Pair) -> None:
        super().__init__(pair)
        check_columns(pair)
        vocabulary = pair.need_tables(self.name).student
        self._shared_bytes = frozenset(vocabulary.token(i) for i in pair.shared_s.tolist())

    def rows(self, written: Written) -> Rows:
        """The rows that open each exact chunk, and which of these chunks add a unit to the candidates."""
        chunks = np.flatnonzero(written.alignment.chunk_exact)
        unit = torch.from_numpy(self._has_unit(written)[chunks])
        first_s, first_t = written.first_s[chunks], written.first_t[chunks]
        return Rows(torch.from_numpy(first_s), torch.from_numpy(first_t), {"unit": unit})

    def extra(self, rows: Rows, written: Written, scores: Scores) -> dict[str, Tensor]:
        """Scores of the units, `[R]`: the mean log-prob of their tokens; the student's carries its gradient."""
        alignment, path = written.alignment, scores.path
        of_row = sent(torch.from_numpy(alignment.chunk_s)[rows.on_host.student], path.logp_s.device)
        sides = ((path.logp_s, alignment.chunk_s), (path.logp_t.detach(), alignment.chunk_t))
        unit_s, unit_t = (_chunk_means(logp, chunk, alignment.num_chunks)[of_row] for logp, chunk in sides)
        return {"unit_s": unit_s, "unit_t": unit_t}

    def __call__(self, logits_s: Tensor, logits_t: Tensor, **inputs: Tensor) -> Values:
        unit = inputs["unit"]
        logp_s, mass_s = _distribution(logits_s, self.pair.shared_s, self.pair.stop_s, inputs["unit_s"], unit)
        logp_t, mass_t = _distribution(logits_t, self.pair.shared_t, self.pair.stop_t, inputs["unit_t"], unit)
        return Values(kl(logp_s, logp_t), {"mass_s": mass_s, "mass_t": mass_t, "unit": unit.to(mass_s.dtype)})

    def _has_unit(self, written: Written) -> Bools:
        """Which chunks are units of their own, bool [C]: cut on either side, not stop, and no shared token's bytes."""
        alignment, student = written.alignment, written.student
        cut: Bools = ((alignment.count_s > 1) | (alignment.count_t > 1)) & ~alignment.chunk_stop & alignment.chunk_exact
        first, last = written.first_s, written.first_s + alignment.count_s - 1
        for chunk in np.flatnonzero(cut):
            text = written.texts[alignment.chunk_segment[chunk]]
            cut[chunk] = text[student.start[first[chunk]] : student.end[last[chunk]]] not in self._shared_bytes
        return cut


def _chunk_means(logp: Tensor, chunk: np.ndarray, num_chunks: int) -> Tensor:
    """Mean of `logp` over the tokens of each chunk, [C]."""
    of_token = sent(torch.from_numpy(chunk), logp.device)
    logp = at_least_float32(logp)
    return chunk_sums(logp, of_token, num_chunks) / chunk_sums(torch.ones_like(logp), of_token, num_chunks)


def _distribution(logits: Tensor, shared: Tensor, stop: Tensor, score: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Log pi of shared tokens, stop and unit, `[R, K + 2]`; and the probability of shared tokens and stop, `[R]`."""
    logits = at_least_float32(logits)
    total = logits.logsumexp(-1, keepdim=True)
    stopped = logits[:, stop].logsumexp(-1, keepdim=True)
    # The softmax over the candidates does not see a shift of all: the unit is lifted, not the others lowered.
    lifted = torch.where(unit[:, None], score.to(logits.dtype)[:, None] + total, -math.inf)
    candidates = torch.cat([logits[:, shared], stopped, lifted], dim=-1)
    with torch.no_grad():
        mass = (candidates[:, :-1].logsumexp(-1) - total.squeeze(-1)).exp()
    return candidates.log_softmax(-1), mass
