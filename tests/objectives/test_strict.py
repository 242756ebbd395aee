"""The divergence on shared tokens and one stop column, against a plain float64 version."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from diglot.alignment import Side, align
from diglot.batches import Written, WrittenSide
from diglot.errors import ConfigError
from diglot.objectives import Pair, make_objective
from diglot.objectives.strict import strict_divergence

# Student: 12 ids, stop {10, 11}; teacher: 9 ids, stop {8}. Shared in another order.
PAIR = Pair(
    same=False,
    size_s=12,
    size_t=9,
    shared_s=torch.tensor([1, 3, 4, 6, 9]),
    shared_t=torch.tensor([7, 0, 2, 5, 1]),
    stop_s=torch.tensor([10, 11]),
    stop_t=torch.tensor([8]),
)


def logits(rows: int, columns: int, seed: int, scale: float = 2.0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def plain(row_s: Tensor, row_t: Tensor, top_k: int, beta: float, residual: bool) -> tuple[float, float, float]:
    """Loss and both kept masses of one row, id by id, from probabilities."""
    p, q = row_s.softmax(-1).tolist(), row_t.softmax(-1).tolist()
    both = sorted(zip(PAIR.shared_s.tolist(), PAIR.shared_t.tolist(), strict=True), key=lambda ids: -p[ids[0]])[:top_k]
    bins_s = [p[i] for i, _ in both] + [sum(p[i] for i in PAIR.stop_s.tolist())]
    bins_t = [q[j] for _, j in both] + [sum(q[j] for j in PAIR.stop_t.tolist())]
    mass_s, mass_t = sum(bins_s), sum(bins_t)
    if residual:
        bins_s, bins_t = [*bins_s, 1 - mass_s], [*bins_t, 1 - mass_t]
    else:
        bins_s, bins_t = [x / mass_s for x in bins_s], [x / mass_t for x in bins_t]
    if beta == 1:
        loss = sum(a * math.log(a / b) for a, b in zip(bins_s, bins_t, strict=True))
    elif beta == 0:
        loss = sum(b * math.log(b / a) for a, b in zip(bins_s, bins_t, strict=True))
    else:
        m = [beta * b + (1 - beta) * a for a, b in zip(bins_s, bins_t, strict=True)]
        loss = beta * sum(b * math.log(b / c) for b, c in zip(bins_t, m, strict=True))
        loss += (1 - beta) * sum(a * math.log(a / c) for a, c in zip(bins_s, m, strict=True))
    return loss, mass_s, mass_t


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("top_k", [1, 3, 5])
def test_strict_is_its_definition(top_k: int, beta: float, residual: bool) -> None:
    s, t = logits(6, 12, 0), logits(6, 9, 1)
    values = make_objective("strict", PAIR, top_k=top_k, beta=beta, residual=residual)(s, t)
    expected = [plain(a, b, top_k, beta, residual) for a, b in zip(s, t, strict=True)]
    assert values.loss.tolist() == pytest.approx([e[0] for e in expected], abs=1e-12)
    assert values.metrics["mass_s"].tolist() == pytest.approx([e[1] for e in expected], abs=1e-12)
    assert values.metrics["mass_t"].tolist() == pytest.approx([e[2] for e in expected], abs=1e-12)


@pytest.mark.parametrize("top_k", [0, None, 5, 99])
def test_no_top_k_means_all_shared_tokens(top_k: int | None) -> None:
    s, t = logits(4, 12, 2), logits(4, 9, 3)
    values = strict_divergence(s, t, PAIR, top_k=top_k)
    assert values.loss.tolist() == pytest.approx([plain(a, b, 5, 1.0, False)[0] for a, b in zip(s, t, strict=True)])


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("residual", [False, True])
def test_strict_equals_jsd_where_shared_tokens_and_stop_are_the_whole_vocabulary(beta: float, residual: bool) -> None:
    same = Pair(True, 8, 8, torch.arange(7), torch.arange(7), torch.tensor([7]), torch.tensor([7]))
    s, t = logits(5, 8, 4).requires_grad_(), logits(5, 8, 5)
    values = strict_divergence(s, t, same, top_k=None, beta=beta, residual=residual)
    expected = make_objective("jsd", same, beta=beta)(s, t)
    torch.testing.assert_close(values.loss, expected.loss, rtol=0, atol=1e-12)
    (one,) = torch.autograd.grad(values.loss.sum(), s)
    (other,) = torch.autograd.grad(expected.loss.sum(), s)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    torch.testing.assert_close(values.metrics["mass_s"], torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("residual", [False, True])
def test_strict_sees_the_distribution_not_the_ids(residual: bool) -> None:
    """Renumbering the teacher, and splitting its stop mass over two ids, changes nothing."""
    s, t = logits(4, 12, 6), logits(4, 9, 7)
    order = torch.tensor([3, 9, 0, 6, 1, 8, 2, 5, 4])
    renumbered = torch.empty(4, 10, dtype=torch.float64)
    renumbered[:, order] = t
    renumbered[:, [4, 7]] = t[:, [8]] - math.log(2)  # order[8] == 4, and 7 was free
    other = Pair(False, 12, 10, PAIR.shared_s, order[PAIR.shared_t], PAIR.stop_s, torch.tensor([7, 4]))
    one = strict_divergence(s, t, PAIR, top_k=2, residual=residual)
    two = strict_divergence(s, renumbered, other, top_k=2, residual=residual)
    torch.testing.assert_close(one.loss, two.loss)
    torch.testing.assert_close(one.metrics["mass_t"], two.metrics["mass_t"])


def test_renormalised_strict_does_not_push_down_what_the_teacher_cannot_name() -> None:
    """Student tokens outside the chosen columns get no gradient at all; with `residual` they do, all of one sign."""
    s, t = logits(4, 12, 8).requires_grad_(), logits(4, 9, 9)
    outside = [0, 2, 5, 7, 8]
    (plain_gradient,) = torch.autograd.grad(strict_divergence(s, t, PAIR, top_k=5).loss.sum(), s)
    assert (plain_gradient[:, outside] == 0).all()
    assert (plain_gradient[:, PAIR.shared_s] != 0).all()
    (with_rest,) = torch.autograd.grad(strict_divergence(s, t, PAIR, top_k=5, residual=True).loss.sum(), s)
    assert (with_rest[:, outside] != 0).all()
    assert (with_rest[:, outside].sign() == with_rest[:, [0]].sign()).all()


def test_residual_is_zero_only_if_the_masses_agree_too() -> None:
    """Same conditional distribution on the chosen columns, another mass: only the residual bin tells them apart."""
    same = Pair(True, 6, 6, torch.arange(3), torch.arange(3), torch.tensor([5]), torch.tensor([5]))
    s = logits(3, 6, 10)
    t = s.clone()
    t[:, 3:5] += 1.0
    assert strict_divergence(s, t, same, top_k=None).loss.abs().max() < 1e-12
    assert strict_divergence(s, t, same, top_k=None, residual=True).loss.min() > 1e-3


def test_residual_keeps_its_precision_where_almost_all_mass_is_chosen() -> None:
    """`1 - mass` would be zero or noise in float32; the sum over the other columns is not."""
    same = Pair(True, 6, 6, torch.arange(3), torch.arange(3), torch.tensor([5]), torch.tensor([5]))
    s, t = logits(4, 6, 11, scale=0.5), logits(4, 6, 12, scale=0.5)
    s[:, 3:5] -= 30.0
    t[:, 3:5] -= 25.0
    exact = strict_divergence(s, t, same, top_k=None, beta=0.0, residual=True).loss
    single = s.float().requires_grad_()
    loss = strict_divergence(single, t.float(), same, top_k=None, beta=0.0, residual=True).loss
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-7)
    loss.sum().backward()
    reference = s.clone().requires_grad_()
    strict_divergence(reference, t, same, top_k=None, beta=0.0, residual=True).loss.sum().backward()
    assert single.grad is not None and reference.grad is not None
    torch.testing.assert_close(single.grad[:, 3:5].double(), reference.grad[:, 3:5], rtol=1e-3, atol=0)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_gradient_is_the_derivative(beta: float, residual: bool) -> None:
    s, t = logits(3, 12, 13).requires_grad_(), logits(3, 9, 14)
    objective = make_objective("strict", PAIR, top_k=3, beta=beta, residual=residual)
    assert torch.autograd.gradcheck(lambda x: objective(x, t).loss, (s,))


def test_no_rows_give_no_values() -> None:
    values = strict_divergence(torch.zeros(0, 12), torch.zeros(0, 9), PAIR, top_k=2, residual=True)
    assert values.loss.shape == values.metrics["mass_s"].shape == (0,)


def test_metrics_carry_no_gradient() -> None:
    values = strict_divergence(logits(2, 12, 15).requires_grad_(), logits(2, 9, 16), PAIR)
    assert values.loss.requires_grad
    assert not any(value.requires_grad for value in values.metrics.values())


def test_rows_are_the_pairs_and_stop_is_one_of_them() -> None:
    def side(ends: list[int]) -> WrittenSide:
        n = len(ends)
        nothing = np.zeros(n, np.int64)
        return WrittenSide(nothing, np.array(ends), nothing, np.ones(n, bool), np.arange(n) == n - 1)

    student, teacher = side([3, 6, 7, 8]), side([3, 7, 8])
    sides = (Side(x.end, x.segment, x.exact, x.stop) for x in (student, teacher))
    written = Written(student, teacher, align(*sides, 1), [b"abcdefg"])
    rows = make_objective("strict", PAIR).rows(written)
    assert (rows.student.tolist(), rows.teacher.tolist()) == ([0, 3], [0, 2])


def test_an_empty_stop_set_is_refused() -> None:
    nothing = Pair(False, 12, 9, PAIR.shared_s, PAIR.shared_t, PAIR.stop_s, torch.tensor([], dtype=torch.int64))
    with pytest.raises(ConfigError, match="the teacher has an empty stop set"):
        make_objective("strict", nothing)


def test_a_stop_id_among_the_shared_tokens_is_refused() -> None:
    twice = Pair(False, 12, 9, PAIR.shared_s, PAIR.shared_t, torch.tensor([9, 11]), PAIR.stop_t)
    with pytest.raises(ConfigError, match=r"ids \[9\] are in the student's stop set \[9, 11\]"):
        make_objective("strict", twice)


def test_a_residual_that_would_be_infinite_is_refused() -> None:
    whole = Pair(False, 6, 9, torch.arange(5), torch.arange(5), torch.tensor([5]), torch.tensor([8]))
    with pytest.raises(ConfigError, match="residual=True with beta=0 is infinite"):
        make_objective("strict", whole, residual=True, beta=0.0, top_k=None)
    objective = make_objective("strict", whole, residual=True, beta=0.5, top_k=None)
    s = logits(3, 6, 17).requires_grad_()
    loss = objective(s, logits(3, 9, 18)).loss
    loss.sum().backward()
    assert s.grad is not None
    assert loss.isfinite().all() and s.grad.isfinite().all()
