"""A small problem for tests of row objectives: two heads, hidden states, and which rows are compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diglot.heads import Head, reduce_rows
from diglot.objectives import Pair, Values, make_objective

V, H, V_T, H_T, N, N_T = 13, 5, 11, 4, 12, 10
PAIR = Pair(
    same=False,
    size_s=V,
    size_t=V_T,
    shared_s=torch.tensor([0, 2, 3, 5, 8, 9, 10]),
    shared_t=torch.tensor([1, 0, 4, 3, 9, 7, 6]),
    stop_s=torch.tensor([11, 12]),
    stop_t=torch.tensor([10]),
)
ROWS_S = torch.tensor([0, 1, 2, 4, 5, 7, 9, 10, 11])
ROWS_T = torch.tensor([0, 2, 3, 4, 5, 6, 7, 8, 9])
WEIGHT = torch.tensor([0.5, 1.0, 0.0, 2.0, 0.25, 1.0, 0.0, 0.1, 3.0])
OBJECTIVE = make_objective("strict", PAIR, top_k=3, beta=0.4, residual=True)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def linear(size_in: int, size_out: int, seed: int, dtype: torch.dtype = torch.float64, bias: bool = True) -> nn.Linear:
    made = nn.Linear(size_in, size_out, bias=bias, dtype=dtype)
    made.weight.data = normal(size_out, size_in, seed=seed, dtype=dtype)
    if bias:
        made.bias.data = normal(size_out, seed=seed + 1, dtype=dtype)
    return made


class Problem:
    """A small student and teacher head with hidden states."""

    def __init__(self, dtype: torch.dtype = torch.float64, **head: Any) -> None:
        self.hidden_s = normal(N, H, seed=1, dtype=dtype).requires_grad_()
        self.hidden_t = normal(N_T, H_T, seed=2, dtype=dtype)
        self.head_s = Head(linear(H, V, 3, dtype), **head)
        self.head_t = Head(linear(H_T, V_T, 5, dtype))
        self.weight = WEIGHT.to(dtype)
        self.inputs = (self.hidden_s, *self.head_s.parameters)

    def reduced(self, chunk_rows: int, objective: Any = OBJECTIVE) -> tuple[Tensor, Values]:
        return reduce_rows(
            objective, self.hidden_s, self.head_s, self.hidden_t, self.head_t, ROWS_S, ROWS_T, self.weight, chunk_rows
        )

    def plain(self, objective: Any = OBJECTIVE) -> tuple[Tensor, Values]:
        values = objective(self.head_s(self.hidden_s[ROWS_S]), self.head_t(self.hidden_t[ROWS_T]).detach())
        return (values.loss * self.weight).sum(), values

    def gradients(self, total: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(total, self.inputs)
