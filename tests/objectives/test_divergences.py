"""The divergences against float64 sums written from their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diglot.errors import ConfigError
from diglot.heads import Head, reduce_rows
from diglot.objectives import Pair, generalized_jsd, make_objective
from diglot.objectives.divergences import forward_kl, kl
from diglot.objectives.jsd import full_jsd

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def pair(size_s: int, size_t: int, *, same: bool = True) -> Pair:
    shared = torch.arange(min(size_s, size_t) - 1)
    stop = torch.tensor([min(size_s, size_t) - 1])
    return Pair(same, size_s, size_t, shared, shared, stop, stop)


def plain_kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def plain_jsd(s: list[float], t: list[float], beta: float) -> float:
    if beta == 0:
        return plain_kl(t, s)
    if beta == 1:
        return plain_kl(s, t)
    m = [beta * b + (1 - beta) * a for a, b in zip(s, t, strict=True)]
    return beta * plain_kl(t, m) + (1 - beta) * plain_kl(s, m)


def random_logps(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2).to(dtype).log_softmax(-1)


@pytest.mark.parametrize("beta", BETAS)
def test_jsd_is_its_definition(beta: float) -> None:
    s, t = random_logps(5, 7, 0), random_logps(5, 7, 1)
    expected = [plain_jsd(a, b, beta) for a, b in zip(s.exp().tolist(), t.exp().tolist(), strict=True)]
    assert generalized_jsd(s, t, beta).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        # s = (1/2, 1/2), t = (1/4, 3/4)
        (0.0, 0.25 * math.log(0.5) + 0.75 * math.log(1.5)),  # KL(t || s)
        (1.0, 0.5 * math.log(2.0) + 0.5 * math.log(2.0 / 3.0)),  # KL(s || t)
        # m = t/4 + 3s/4 = (7/16, 9/16)
        (
            0.25,
            0.25 * (0.25 * math.log(4 / 7) + 0.75 * math.log(4 / 3))
            + 0.75 * (0.5 * math.log(8 / 7) + 0.5 * math.log(8 / 9)),
        ),
    ],
)
def test_beta_zero_is_forward_and_beta_one_is_reverse(beta: float, expected: float) -> None:
    s, t = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert generalized_jsd(s, t, beta).item() == pytest.approx(expected, rel=1e-5)
    assert generalized_jsd(t, s, beta).item() != pytest.approx(expected, rel=1e-2)
    if beta != 0.5:
        assert generalized_jsd(s, t, 1 - beta).item() != pytest.approx(expected, rel=1e-2)


def test_jsd_of_one_half_is_symmetric_and_at_most_log_two() -> None:
    s, t = random_logps(20, 9, 2) * 5, random_logps(20, 9, 3) * 5
    s, t = s.log_softmax(-1), t.log_softmax(-1)
    torch.testing.assert_close(generalized_jsd(s, t, 0.5), generalized_jsd(t, s, 0.5))
    assert generalized_jsd(s, t, 0.5).max() <= math.log(2)
    disjoint = generalized_jsd(torch.tensor([[0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0]]), 0.5)
    assert disjoint.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("beta", BETAS)
def test_zero_masses_give_neither_nan_values_nor_nan_gradients(beta: float) -> None:
    inf = math.inf
    logits_s = torch.tensor([[0.3, -inf, 1.0, -0.2]], dtype=torch.float64, requires_grad=True)
    logits_t = torch.tensor([[0.1, -inf, 0.5, 2.0]], dtype=torch.float64)
    loss = generalized_jsd(logits_s.log_softmax(-1), logits_t.log_softmax(-1), beta)
    loss.sum().backward()
    common = [0, 2, 3]
    expected = plain_jsd(logits_s[0, common].softmax(-1).tolist(), logits_t[0, common].softmax(-1).tolist(), beta)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert logits_s.grad is not None
    assert logits_s.grad.isfinite().all()
    assert logits_s.grad[0, 1] == 0


def test_mass_where_the_other_side_has_none_is_infinite_in_kl_and_finite_in_the_mixture() -> None:
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]).log()
    assert kl(p, q).item() == math.inf
    assert kl(q, p).item() == pytest.approx(math.log(2))
    one_sided = q.clone().requires_grad_()
    loss = generalized_jsd(one_sided, p, 0.5)
    loss.sum().backward()
    assert loss.item() == pytest.approx(plain_jsd([1.0, 0.0], [0.5, 0.5], 0.5))
    assert one_sided.grad is not None
    assert one_sided.grad.isfinite().all()


def test_forward_kl_of_masses_is_kl_of_logs_and_so_is_its_gradient() -> None:
    p, logits = random_logps(5, 9, 12).exp(), random_logps(5, 9, 13)
    p[0, 3:] = p[1, 0] = 0.0
    logits[0, 5:] = -math.inf  # where p has no mass, q may have none
    weight = torch.arange(1.0, 6.0, dtype=torch.float64)
    values, gradients = [], []
    for divergence in (forward_kl, lambda p, logq: kl(p.log(), logq)):
        leaf = logits.clone().requires_grad_()
        value = divergence(p, leaf.log_softmax(-1))
        (gradient,) = torch.autograd.grad((weight * value).sum(), leaf)
        values.append(value.detach())
        gradients.append(gradient)
    torch.testing.assert_close(*values, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-13)
    logits[0, 2] = -math.inf
    assert forward_kl(p, logits.log_softmax(-1))[0] == math.inf  # where p has mass, it may not


@pytest.mark.parametrize("beta", BETAS)
def test_equal_rows_have_zero_divergence_and_zero_gradient(beta: float) -> None:
    logits = random_logps(4, 11, 4).requires_grad_()
    loss = full_jsd(logits, logits.detach(), beta)
    loss.sum().backward()
    assert logits.grad is not None
    assert loss.abs().max() < 1e-14
    assert logits.grad.abs().max() < 1e-14


@pytest.mark.parametrize("beta", BETAS)
def test_the_gradient_is_the_derivative(beta: float) -> None:
    logits = random_logps(3, 6, 5).requires_grad_()
    teacher = random_logps(3, 6, 6)
    assert torch.autograd.gradcheck(lambda x: full_jsd(x / 1.7, teacher / 1.7, beta), (logits,))


@pytest.mark.parametrize("beta", BETAS)
def test_both_sides_have_a_derivative_whatever_their_entries_sum_to(beta: float) -> None:
    s, t = (x + shift for x, shift in ((random_logps(3, 6, 5), 0.3), (random_logps(3, 6, 6), -0.2)))
    assert torch.autograd.gradcheck(
        lambda a, b: generalized_jsd(a, b, beta), (s.requires_grad_(), t.requires_grad_()), rtol=1e-6
    )
    one_row = random_logps(1, 6, 7).requires_grad_()  # a row for all
    (gradient,) = torch.autograd.grad(generalized_jsd(s.detach(), one_row, beta).sum(), one_row)
    (every,) = torch.autograd.grad(
        generalized_jsd(s.detach(), whole := one_row.detach().repeat(3, 1).requires_grad_(), beta).sum(), whole
    )
    torch.testing.assert_close(gradient, every.sum(0, keepdim=True))


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("distance", [1e-2, 1e-4])
def test_the_gradient_near_the_teacher_is_no_rounding_noise(beta: float, distance: float) -> None:
    """Of rows of 4,000 columns in float32, from the same log-probs as in float64."""
    teacher = random_logps(4, 4000, 20, torch.float32)
    student = teacher + distance * torch.randn(teacher.shape, generator=torch.Generator().manual_seed(21))
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaf = student.to(dtype).requires_grad_()
        value = generalized_jsd(leaf, teacher.to(dtype), beta)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        gradients.append(gradient.double())
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 1e-6


def test_padding_columns_of_the_wider_table_are_removed_before_the_softmax() -> None:
    s, t = random_logps(3, 8, 7), random_logps(3, 6, 8)
    s[:, 6:] = 50.0  # would take all of the mass
    expected = full_jsd(s[:, :6], t, 0.3)
    objective = make_objective("jsd", pair(8, 6), beta=0.3)
    torch.testing.assert_close(objective(s, t).loss, expected)
    torch.testing.assert_close(full_jsd(t, s, 0.7), full_jsd(t, s[:, :6], 0.7))


def test_kd_temperature_divides_both_logits_and_nothing_else() -> None:
    s, t = random_logps(3, 6, 9), random_logps(3, 6, 10)
    expected = generalized_jsd((s / 2.5).log_softmax(-1), (t / 2.5).log_softmax(-1), 0.5)
    head = Head(torch.nn.Identity())
    rows, weight = torch.arange(3), torch.ones(3)
    objective = make_objective("jsd", pair(6, 6))
    _, values = reduce_rows(objective, s, head, t, head, rows, rows, weight, 2, temperature=2.5)
    torch.testing.assert_close(values.loss, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["jsd", "strict"])
def test_low_precision_logits_are_compared_in_float32(name: str, dtype: torch.dtype) -> None:
    s, t = random_logps(3, 40, 11, dtype), random_logps(3, 40, 12, dtype)
    objective = make_objective(name, pair(40, 40))
    assert objective(s, t).loss.dtype == torch.float32
    torch.testing.assert_close(objective(s, t).loss, objective(s.float(), t.float()).loss, rtol=0, atol=0)
    assert objective(s.double(), t.double()).loss.dtype == torch.float64


def test_jsd_refuses_two_vocabularies_and_says_what_works() -> None:
    with pytest.raises(ConfigError, match=r"student 9 ids, teacher 7, 6 with equal bytes.*'strict'.*'span'"):
        make_objective("jsd", pair(9, 7, same=False))


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [("jsd", "beta", 1.2), ("strict", "beta", -0.1), ("strict", "top_k", -1)],
)
def test_values_that_cannot_work_are_refused(name: str, option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{option}={value}"):
        make_objective(name, pair(6, 6), **{option: value})


def test_a_pair_moves_with_its_tensors() -> None:
    moved = pair(6, 6).to("meta")
    assert moved.shared_s.is_meta and moved.stop_t.is_meta and moved.size_s == 6
