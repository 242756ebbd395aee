"""A strict divergence from single columns equals the same on whole rows of logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.row_problem import PAIR, ROWS_S, ROWS_T, Problem
from torch import Tensor

from diglot.heads import Head, reduce_rows
from diglot.objectives import Values, make_objective


def whole(objective: Any) -> Any:
    """The same objective, known only as a function of whole rows."""
    return lambda logits_s, logits_t: objective(logits_s, logits_t)


def reduced(problem: Problem, objective: Any, chunk_rows: int, temperature: float = 1.0) -> tuple[Tensor, Values]:
    return reduce_rows(
        objective,
        problem.hidden_s,
        problem.head_s,
        problem.hidden_t,
        problem.head_t,
        ROWS_S,
        ROWS_T,
        problem.weight,
        chunk_rows,
        temperature,
    )


@pytest.mark.parametrize("head", [{}, {"scale": 0.3}, {"softcap": 1.5}])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_value_and_gradients_equal_those_of_whole_rows(
    head: dict[str, float], beta: float, chunk_rows: int, temperature: float
) -> None:
    objective = make_objective("strict", PAIR, top_k=3, beta=beta)
    problem = Problem(**head)
    total, values = reduced(problem, objective, chunk_rows, temperature)
    expected, plain = reduced(problem, whole(objective), 100, temperature)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(values.loss, plain.loss, rtol=1e-12, atol=1e-12)
    for gradient, wanted in zip(problem.gradients(total), problem.gradients(expected), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(values.metrics["mass_s"], plain.metrics["mass_s"])
    measured = ~values.metrics["mass_t"].isnan()
    assert measured.any()
    torch.testing.assert_close(values.metrics["mass_t"][measured], plain.metrics["mass_t"][measured])


def test_the_teachers_head_is_asked_for_few_whole_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem()
    objective = make_objective("strict", PAIR, top_k=3)
    seen: list[int] = []
    original = Head.__call__

    def spy(self: Head, hidden: Tensor) -> Tensor:
        if self is problem.head_t:
            seen.append(len(hidden))
        return original(self, hidden)

    monkeypatch.setattr("diglot.heads.rows._MASS_ROWS", 2)
    monkeypatch.setattr(Head, "__call__", spy)
    reduced(problem, objective, 100)
    assert sum(seen) <= 3 < len(ROWS_T)


def test_a_residual_bin_or_all_columns_read_whole_rows() -> None:
    assert make_objective("strict", PAIR, top_k=3).reads_few  # type: ignore[union-attr]
    assert not make_objective("strict", PAIR, top_k=3, residual=True).reads_few  # type: ignore[union-attr]
    assert not make_objective("strict", PAIR, top_k=0).reads_few  # type: ignore[union-attr]
