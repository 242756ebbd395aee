"""Sums of probabilities over sets of columns: the step from token distributions to distributions over something both
sides share."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-8
"""A mass that no token can carry to a cell counts as this much where a KL divergence would be infinite."""


def log_mass(mass: Tensor) -> Tensor:
    """Log of masses; those that have underflowed count as the smallest normal number, and get no gradient."""
    return mass.clamp(min=torch.finfo(mass.dtype).tiny).log()


def gathered(probs: Tensor, cells: Tensor, count: int) -> Tensor:
    """Mass of each cell, `[R, count]`, of rows of probabilities `[R, V]` whose columns lie in `cells` `[V]`."""
    zeros = probs.new_zeros(len(probs), count)
    return zeros.scatter_add(1, cells.expand_as(probs), probs)


def ragged(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """All integers of the ranges `[low, high)`, one after the other, and to which range each belongs."""
    length = (high - low).clamp(min=0)
    owner = torch.repeat_interleave(length)
    begin = length.cumsum(0) - length
    return torch.arange(len(owner), device=low.device) - begin[owner] + low[owner], owner
