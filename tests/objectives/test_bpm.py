"""The cells of `bpm`: the student's distribution over some tokens, stop, and everything else together."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diglot.objectives.bpm import _Cells

R, V = 4, 7
STOPS = [[], [6], [2, 6]]


def problem(stops: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[R, V]`; which tokens have a cell of their own: some, none, all others; the stop ids."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(R, V, dtype=torch.float64, generator=generator)
    tokens = torch.rand(R, V, generator=generator) < 0.5
    tokens[1], tokens[2] = False, True
    ids = torch.tensor(stops, dtype=torch.int64)
    return logits, tokens.index_fill(-1, ids, False), ids


def reference(logits: Tensor, tokens: Tensor, stops: Tensor) -> Tensor:
    """The same by autograd, mass by mass."""
    probs = logits.softmax(-1)
    others = probs.masked_fill(tokens, 0.0).index_fill(-1, stops, 0.0).sum(-1, keepdim=True)
    stop = probs[:, stops].sum(-1, keepdim=True)
    return torch.cat([probs.masked_fill(~tokens, 0.0), stop, others], dim=-1)


@pytest.mark.parametrize("stops", STOPS)
def test_the_cells_are_a_distribution_and_its_logarithm(stops: list[int]) -> None:
    logits, tokens, ids = problem(stops)
    cells = _Cells.apply(logits, tokens, ids)
    torch.testing.assert_close(cells.exp(), reference(logits, tokens, ids), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(cells.logsumexp(-1), torch.zeros(R, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("stops", STOPS)
def test_their_gradient_is_the_derivative(stops: list[int]) -> None:
    logits, tokens, ids = problem(stops)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: _Cells.apply(x, tokens, ids).exp(), (logits,))
    there = _Cells.apply(logits, tokens, ids).isfinite()
    assert torch.autograd.gradcheck(lambda x: _Cells.apply(x, tokens, ids)[there], (logits,))


def test_a_cell_of_next_to_no_mass_has_the_gradient_of_its_own_columns() -> None:
    """Its logarithm, not its mass, is what is compared: e^-120 is zero in float32, and so its gradient."""
    logits = torch.tensor([[0.0, 1.0, -120.0, -121.0]], requires_grad=True)
    tokens = torch.tensor([[True, True, False, False]])
    cells = _Cells.apply(logits, tokens, torch.zeros(0, dtype=torch.int64))
    assert cells[0, -1].item() == pytest.approx(-120 + math.log(1 + math.exp(-1)) - math.log(1 + math.e), rel=1e-6)
    cells[0, -1].backward()
    assert logits.grad is not None
    distribution, share = torch.tensor([0.0, 1.0]).softmax(-1), torch.tensor([0.0, -1.0]).softmax(-1)
    torch.testing.assert_close(logits.grad[0], torch.cat([-distribution, share]), rtol=1e-5, atol=1e-6)
