"""How far the policy in training is from the one that wrote, at each inner step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diglot.objectives import policy_gradient
from diglot.objectives.span import clipped_policy_gradient


def watched_log_ratios(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A list that grows by the largest log-ratio of each policy gradient that is formed from now on, in nats."""
    seen: list[float] = []

    def watched(logp: torch.Tensor, logp_old: torch.Tensor, *others: Any) -> Any:
        seen.append(float((logp - logp_old).detach().abs().max()))
        return clipped_policy_gradient(logp, logp_old, *others)

    monkeypatch.setattr(policy_gradient, "clipped_policy_gradient", watched)
    return seen
