"""MiniLLM's long part: clipped policy gradient on advantages that are known since the text was written."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diglot.arrays import Bools
from diglot.batches import Written
from diglot.batches.sending import sent
from diglot.errors import ConfigError
from diglot.objectives.base import Objective
from diglot.objectives.levels import Level
from diglot.objectives.scores import Metrics, Scores
from diglot.objectives.span import clipped_policy_gradient


@dataclass(frozen=True)
class ScoredTokens:
    """The student's tokens that lie in an exact chunk."""

    mask: Bools  # [N_s]

    @property
    def items(self) -> int:
        """How many."""
        return int(self.mask.sum())


class PolicyGradient(Objective):
    """PPO's clipped surrogate of every scored token (MiniLLM, arXiv 2306.08543, eq. 5 and algorithm 1).

    Needs a `Rollout` with advantages. The value is a surrogate: its gradient is the estimate, its size means nothing.

    Args:
        epsilon: the ratio of probabilities is clipped to `[1 - epsilon, 1 + epsilon]`.
    """

    name = "policy_gradient"
    needs = Level.TEXT_LOGPROBS

    def __init__(self, *, epsilon: float = 0.2) -> None:
        self.epsilon = epsilon

    def plan(self, written: Written) -> ScoredTokens:
        return ScoredTokens(written.usable_s)

    def loss(self, plan: ScoredTokens, scores: Scores, share: float) -> tuple[Tensor, Metrics]:
        rollout = scores.rollout
        if rollout is None or rollout.advantage is None:
            raise ConfigError("A policy gradient needs advantages of the text, and this text was written by nobody.")
        logp = scores.student_text(scores.temperature)
        surrogate, clipped = clipped_policy_gradient(
            logp, rollout.logp_old, rollout.advantage, self.epsilon, rollout.weight
        )
        if scores.sampler_weight is not None:
            surrogate = surrogate * scores.sampler_weight
        scored = sent(torch.from_numpy(np.flatnonzero(plan.mask)), logp.device)
        return share * surrogate[scored].sum(), {"clip_ratio": clipped[scored].to(logp.dtype)}
