"""What 16 bits may cost a gradient: the rounding of the factors of a product, and nothing of its result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diglot.heads import Head, reduce_rows, token_logps
from diglot.objectives.divergences import generalized_jsd
from diglot.objectives.scores import Values

R, H, V = 48, 32, 1024


def divergence(s: Tensor, t: Tensor) -> Values:
    return Values(generalized_jsd(s.log_softmax(-1), t.log_softmax(-1), 1.0))


class Near:
    """A student near its teacher: weights and hidden states that every number type here holds exactly."""

    def __init__(self, dtype: torch.dtype, stored: torch.dtype, gap: float, device: str = "cpu") -> None:
        torch.manual_seed(0)
        weight, hidden = torch.randn(V, H) * 0.3, torch.randn(R, H)
        values = weight, weight + gap * torch.randn(V, H), hidden, hidden + gap * torch.randn(R, H)
        weight_s, weight_t, hidden_s, hidden_t = (x.to(stored).to(dtype).to(device) for x in values)
        self.heads = [nn.Linear(H, V, bias=False, dtype=dtype, device=device) for _ in range(2)]
        for module, weight in zip(self.heads, (weight_s, weight_t), strict=True):
            module.weight.data = weight
        self.hidden_s, self.hidden_t = hidden_s.requires_grad_(), hidden_t

    def gradients(self, weight: float, loss_scale: float = 1.0) -> tuple[Tensor, Tensor, float]:
        """Of hidden states and head, in float64 and without the loss scale, and the mean divergence in nats."""
        rows = torch.arange(R, device=self.hidden_s.device)
        weights = torch.full((R,), weight, dtype=torch.float64, device=rows.device)
        heads = Head(self.heads[0]), Head(self.heads[1])
        ends = self.hidden_s, heads[0], self.hidden_t, heads[1]
        total, values = reduce_rows(divergence, *ends, rows, rows, weights, 32)
        (total * loss_scale).backward()
        of_weight = self.heads[0].weight.grad
        assert self.hidden_s.grad is not None and of_weight is not None
        gradients = [g.double().cpu() / loss_scale for g in (self.hidden_s.grad, of_weight)]
        return gradients[0], gradients[1], float(values.loss.mean())


def error(rounded: Tensor, exact: Tensor) -> float:
    return float((rounded - exact).norm() / exact.norm())


@pytest.mark.parametrize(("gap", "largest"), [(0.1, 1.0), (0.01, 1e-2), (0.003, 1e-3)])
def test_bfloat16_weights_give_the_float64_gradient_near_the_teacher(gap: float, largest: float) -> None:
    """Up to the rounding of the gradient itself, which is handed over in bfloat16."""
    *exact, nats = Near(torch.float64, torch.bfloat16, gap).gradients(1.0)
    assert 0 < nats < largest
    *gradients, _ = Near(torch.bfloat16, torch.bfloat16, gap).gradients(1.0)
    assert max(map(error, gradients, exact)) < 3e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [64, 4096, 524288])
def test_autocast_gives_the_float64_gradient_whatever_the_weight_of_a_row(dtype: torch.dtype, tokens: int) -> None:
    *exact, _ = Near(torch.float64, dtype, 0.05).gradients(1 / tokens)
    with torch.autocast("cpu", dtype=dtype):
        *gradients, _ = Near(torch.float32, dtype, 0.05).gradients(1 / tokens, loss_scale=65536.0)
    assert max(map(error, gradients, exact)) < 1e-4


def test_float16_hidden_states_get_a_gradient_of_rows_that_count_little() -> None:
    """A millionth of the window, whose loss a scale then multiplies by 65,536: more than float16 holds."""
    *exact, _ = Near(torch.float64, torch.float16, 0.05).gradients(1e-6)
    *gradients, _ = Near(torch.float16, torch.float16, 0.05).gradients(1e-6, loss_scale=65536.0)
    assert max(map(error, gradients, exact)) < 3e-3


def test_log_probs_under_autocast_are_those_of_float64() -> None:
    low, exact = Near(torch.float32, torch.bfloat16, 0.1), Near(torch.float64, torch.bfloat16, 0.1)
    targets, never = torch.arange(R) * 7, torch.zeros(R, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = token_logps(low.hidden_s, Head(low.heads[0]), targets, never, [1], 16)
    expected = token_logps(exact.hidden_s, Head(exact.heads[0]), targets, never, [1], 16)
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=1e-5)
    of_logps, of_expected = (torch.autograd.grad(x.sum(), y.hidden_s)[0] for x, y in ((logps, low), (expected, exact)))
    assert error(of_logps.double(), of_expected) < 1e-4


@pytest.mark.cuda
@pytest.mark.parametrize(("gap", "most"), [(0.1, 0.01), (0.003, 0.01)])
def test_a_gpu_adds_products_of_bfloat16_in_float32(gap: float, most: float) -> None:
    *exact, _ = Near(torch.float64, torch.bfloat16, gap).gradients(1e-5)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        *gradients, _ = Near(torch.float32, torch.bfloat16, gap, "cuda").gradients(1e-5)
    assert max(map(error, gradients, exact)) < most
