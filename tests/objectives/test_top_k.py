"""The divergence of coarsened distributions on the teacher's likeliest tokens, against a version that adds up id by
id."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.scored import Scored
from torch import Tensor

from diglot.errors import ConfigError
from diglot.objectives import Level, Pair, make_objective
from diglot.objectives.masses import FLOOR

# Student: 12 ids, stop {10, 11}; teacher: 9 ids, stop {7, 8}. Teacher ids 3, 4 and 6 are not the student's.
PAIR = Pair(
    same=False,
    size_s=12,
    size_t=9,
    shared_s=torch.tensor([1, 3, 4, 9]),
    shared_t=torch.tensor([0, 2, 5, 1]),
    stop_s=torch.tensor([10, 11]),
    stop_t=torch.tensor([7, 8]),
)


def logits(rows: int, columns: int, seed: int, scale: float = 2.0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def values_of(k: int, logits_s: Tensor, logits_t: Tensor, **options: Any) -> Any:
    best = logits_t.log_softmax(-1).topk(k)
    return make_objective("top_k", PAIR, k=k, **options)(logits_s, None, top_ids=best.indices, top_logps=best.values)


def cells(row_s: Tensor, row_t: Tensor, k: int) -> tuple[list[float], list[float]]:
    """Both sides' masses of the cells of one row."""
    p, q = row_s.softmax(-1).tolist(), row_t.softmax(-1).tolist()
    twin = dict(zip(PAIR.shared_t.tolist(), PAIR.shared_s.tolist(), strict=True))
    best = sorted(range(len(q)), key=lambda i: -q[i])[:k]
    shared, stops = [i for i in best if i in twin], [i for i in best if i in (7, 8)]
    of_s, of_t = [p[twin[i]] for i in shared], [q[i] for i in shared]
    if stops:
        of_s.append(p[10] + p[11])
        of_t.append(sum(q[i] for i in stops))
    return [*of_s, 1 - sum(of_s)], [*of_t, max(1 - sum(of_t), FLOOR)]


def plain(p: list[float], q: list[float], beta: float) -> float:
    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    if beta in (0.0, 1.0):
        return kl(q, p) if beta == 0 else kl(p, q)
    m = [beta * y + (1 - beta) * x for x, y in zip(p, q, strict=True)]
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("k", [1, 3, 6, 9])
def test_values_are_those_of_cells_that_are_added_up_one_by_one(k: int, beta: float) -> None:
    a, b = logits(40, 12, 0), logits(40, 9, 1)
    expected = [plain(*cells(s, t, k), beta) for s, t in zip(a, b, strict=True)]
    torch.testing.assert_close(values_of(k, a, b, beta=beta).loss, torch.tensor(expected, dtype=torch.float64))


def test_it_is_zero_at_equal_distributions_and_at_most_the_divergence_of_the_whole_distributions() -> None:
    """Equal vocabularies, where the whole divergence is known; a finer partition never gives less."""
    pair = Pair(True, 9, 9, torch.arange(7), torch.arange(7), torch.tensor([7, 8]), torch.tensor([7, 8]))
    a, b = logits(50, 9, 2), logits(50, 9, 3)
    whole = (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1)
    for k in (1, 4, 9):
        best = b.log_softmax(-1).topk(k)
        objective = make_objective("top_k", pair, k=k)
        values = objective(a, None, top_ids=best.indices, top_logps=best.values)
        exact = values.metrics["stop_bound"] < 1e-12
        assert exact.any() and (values.loss <= whole + 1e-9)[exact].all()
        same = objective(b, None, top_ids=best.indices, top_logps=best.values)
        assert same.loss[exact].abs().max() < 1e-7


def test_the_stop_bound_is_at_least_the_mass_that_the_stop_cell_lacks() -> None:
    b = logits(200, 9, 4)
    values, q = values_of(4, logits(200, 12, 5), b), b.softmax(-1)
    seen = q.topk(4).indices
    named = torch.stack([(seen == i).any(-1) for i in (7, 8)], -1)
    lacking = (q[:, 7:] * ~named).sum(-1) * named.any(-1)
    assert (values.metrics["stop_bound"] >= lacking - 1e-12).all() and (lacking > 0).any()


def test_rows_of_which_a_server_gave_fewer_ids_are_read_as_far_as_they_go() -> None:
    a, best = logits(5, 12, 6), logits(5, 9, 7).log_softmax(-1).topk(3)
    short = make_objective("top_k", PAIR, k=3)(a, None, top_ids=best.indices, top_logps=best.values)
    ids = torch.cat([best.indices, torch.full((5, 2), -1)], -1)
    logps = torch.cat([best.values, torch.full((5, 2), -math.inf, dtype=torch.float64)], -1)
    long = make_objective("top_k", PAIR, k=5)(a, None, top_ids=ids, top_logps=logps)
    assert torch.equal(short.loss, long.loss)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_gradient_is_that_of_finite_differences(beta: float) -> None:
    a, b = logits(4, 12, 8).requires_grad_(), logits(4, 9, 9)
    assert torch.autograd.gradcheck(lambda x: values_of(5, x, b, beta=beta).loss, (a,))


def test_it_asks_for_no_more_than_a_server_gives_and_no_rows_of_logits() -> None:
    scored = Scored.of("chatml", "turns")
    objective = make_objective("top_k", scored.pair, k=7)
    assert objective.needs == Level.TOP_K
    rows, inputs = scored.rows_and_inputs(objective)  # type: ignore[arg-type]
    assert inputs["top_ids"].shape == (len(rows.student), 7)
    assert objective(scored.logits_s[rows.student], None, **inputs).loss.isfinite().all()  # type: ignore[operator]


def test_options_that_read_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="k=0 reads nothing"):
        make_objective("top_k", PAIR, k=0)
    with pytest.raises(ConfigError, match=r"beta=1\.5"):
        make_objective("top_k", PAIR, beta=1.5)
