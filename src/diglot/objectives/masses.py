"""Sums of probabilities over sets of columns: the step from token distributions to distributions over something both
sides share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diglot.objectives.pair import Pair

FLOOR = 1e-8
"""A mass that no token can carry to a cell counts as this much where a KL divergence would be infinite."""


def log_mass(mass: Tensor) -> Tensor:
    """Log of masses; those that have underflowed count as the smallest normal number, and get no gradient."""
    return mass.clamp(min=torch.finfo(mass.dtype).tiny).log()


def no_text(pair: Pair) -> tuple[Tensor, Tensor]:
    """Ids of the student and of the teacher that are neither text nor stop: control tokens, padding of the embedding.

    One event for both sides, since no name of one side need mean anything on the other: a student that writes control
    tokens where its teacher writes none is to be told so. Empty for a pair without vocabularies.
    """
    if pair.tables is None:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    sides = (pair.tables.student, pair.stop_s), (pair.tables.teacher, pair.stop_t)
    silent = [(torch.from_numpy((table.lengths == 0).nonzero()[0]), stop.cpu()) for table, stop in sides]
    of_student, of_teacher = (ids[~torch.isin(ids, stop)] for ids, stop in silent)
    return of_student, of_teacher


def gathered(probs: Tensor, cells: Tensor, count: int) -> Tensor:
    """Mass of each cell, `[R, count]`, of rows of probabilities `[R, V]` whose columns lie in `cells` `[V]`."""
    zeros = probs.new_zeros(len(probs), count)
    return zeros.scatter_add(1, cells.expand_as(probs), probs)


def ragged(low: Tensor, high: Tensor, size: int | None = None) -> tuple[Tensor, Tensor]:
    """All integers of the ranges `[low, high)`, one after the other, and to which range each belongs.

    `size`: how many they are. Without it the host has to ask the device.
    """
    length = (high - low).clamp(min=0)
    owner = torch.repeat_interleave(length, output_size=size)
    begin = length.cumsum(0) - length
    return torch.arange(len(owner), device=low.device) - begin[owner] + low[owner], owner
