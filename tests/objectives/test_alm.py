"""Chunk likelihood matching against its definition, written with loops and probabilities."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.chunk_problem import DOUBLE, aligned, plain_end, random_alignment, random_path, side, tokens_of
from torch import Tensor

from diglot.alignment import Alignment
from diglot.errors import ConfigError
from diglot.objectives import Pair, Path, make_objective
from diglot.objectives.alm import event_divergence, log1mexp

PAIR = Pair(False, 4, 5, torch.tensor([0, 1]), torch.tensor([2, 1]), torch.tensor([3]), torch.tensor([4]))


def alm(**options: Any):
    return make_objective("alm", PAIR, **options)


def coin(logp_s: float, logp_t: float, tau: float | None, divergence: str) -> float:
    """The divergence of one event from probabilities, or its closed limit from surprisals."""
    if tau is None:
        a, b = -logp_t, -logp_s
        limits = {"kl": a * math.log(a / b) - a + b, "reverse_kl": b * math.log(b / a) - b + a, "tvd": abs(a - b)}
        return limits[divergence]
    p, q = math.exp(logp_t / tau), math.exp(logp_s / tau)
    if divergence == "tvd":
        return tau * abs(p - q)
    if divergence == "reverse_kl":
        p, q = q, p
    return tau * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))


def plain(path: Path, alignment: Alignment[Tensor], **options: Any) -> tuple[list[float], list[float]]:
    """Values and `compared` of each chunk, by walking through the chunks one after the other."""
    chunks, noncanonical = options.get("chunks", "all"), options.get("noncanonical", "none")
    tau, divergence = options.get("tau", 100.0), options.get("divergence", "kl")
    count = alignment.num_chunks
    segment = alignment.chunk_segment.tolist()

    def usable(k: int) -> bool:
        odd = noncanonical == "mask" and any(bool(path.noncanonical[i]) for i in tokens_of(alignment.chunk_s, k))
        return bool(alignment.chunk_exact[k]) and not odd

    values, compared = [0.0] * count, [0.0] * count
    sum_s = sum_t = 0.0
    for k in range(count):
        if not usable(k):
            continue
        sum_s += sum(path.logp_s[i].item() for i in tokens_of(alignment.chunk_s, k))
        sum_t += sum(path.logp_t[j].item() for j in tokens_of(alignment.chunk_t, k))
        end_s = plain_end(path.boundary_s, alignment.chunk_s, alignment, k)
        end_t = plain_end(path.boundary_t, alignment.chunk_t, alignment, k)
        compared[k] = 1.0
        if chunks == "threshold" and abs(end_t - end_s) > options.get("threshold", 0.1):
            compared[k] = sum_s = sum_t = 0.0
            continue
        last = k + 1 == count or segment[k + 1] != segment[k] or not usable(k + 1)
        if chunks == "outcome" and not last and math.exp(end_t) < options.get("gamma", 0.1):
            continue
        with_end = chunks == "outcome" or noncanonical == "boundary"
        values[k] = coin(sum_s + with_end * end_s, sum_t + with_end * end_t, tau, divergence)
        sum_s = sum_t = 0.0
    return values, compared


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "tvd"])
@pytest.mark.parametrize("tau", [1.0, 100.0, None])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"noncanonical": "mask"},
        {"noncanonical": "boundary"},
        {"chunks": "threshold", "threshold": 1.5},
        {"chunks": "threshold", "threshold": 1.5, "noncanonical": "boundary"},
        {"chunks": "outcome"},
        {"chunks": "outcome", "gamma": 0.4, "noncanonical": "mask"},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_alm_is_its_definition(divergence: str, tau: float | None, options: dict[str, Any], seed: int) -> None:
    alignment = random_alignment(seed)
    path = random_path(alignment, seed)
    objective = alm(tau=tau, divergence=divergence, **options)
    values, mask = objective(path, alignment)
    expected, compared = plain(path, alignment, tau=tau, divergence=divergence, **options)
    assert values.loss.tolist() == pytest.approx(expected, abs=1e-9)
    assert values.metrics["compared"].tolist() == compared
    assert torch.equal(mask, objective.mask(alignment)) and torch.equal(mask, alignment.chunk_exact)
    assert not (~mask).all() and not mask.all()


def test_the_options_of_the_definition_are_not_idle() -> None:
    """The references above would agree on anything if merging, filtering and masking never happened."""
    alignment = random_alignment(0)
    path = random_path(alignment, 0)
    options = ({}, dict(chunks="outcome"), dict(chunks="threshold", threshold=1.5), dict(noncanonical="mask"))
    values = [alm(**o)(path, alignment)[0] for o in options]
    whole, merged, filtered, masked = values
    exact = int(alignment.chunk_exact.sum())
    assert int((whole.loss != 0).sum()) == exact > int((merged.loss != 0).sum())
    assert merged.metrics["compared"].sum() == exact
    assert 0 < filtered.metrics["compared"].sum() < exact and 0 < masked.metrics["compared"].sum() < exact


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "tvd"])
def test_a_growing_tau_approaches_the_closed_form(divergence: str) -> None:
    """With the factor tau the finite form has a limit that is not zero; the distance falls like 1/tau."""
    generator = torch.Generator().manual_seed(0)
    logp_s, logp_t = (-torch.rand(50, generator=generator, dtype=DOUBLE) * 8 - 0.01 for _ in range(2))
    limit = event_divergence(logp_s, logp_t, None, divergence)
    errors = [float((event_divergence(logp_s, logp_t, tau, divergence) - limit).abs().max()) for tau in (1e2, 1e3, 1e4)]
    assert limit.max() > 1 and errors[2] < 1e-2
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.1) and errors[2] == pytest.approx(errors[1] / 10, rel=0.1)


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "tvd"])
@pytest.mark.parametrize("tau", [1.0, 100.0, None])
def test_equal_chunk_likelihoods_give_no_loss_and_no_gradient(divergence: str, tau: float | None) -> None:
    """Two student tokens against one teacher token of the same likelihood, then one against two."""
    alignment = aligned(side([1, 2, 4]), side([2, 3, 4]))
    logp_s = torch.tensor([-0.5, -1.5, -3.0], dtype=DOUBLE, requires_grad=True)
    logp_t = torch.tensor([-2.0, -1.0, -2.0], dtype=DOUBLE)
    loss = alm(tau=tau, divergence=divergence)(Path(logp_s, logp_t), alignment)[0].loss
    loss.sum().backward()
    assert loss.abs().max() < 1e-12
    assert logp_s.grad is not None and logp_s.grad.abs().max() < 1e-12


@pytest.mark.parametrize("options", [{"chunks": "outcome", "gamma": 0.3}, {"noncanonical": "boundary"}], ids=str)
def test_equal_outcomes_give_no_loss_and_no_gradient(options: dict[str, Any]) -> None:
    alignment = aligned(side([1, 2, 4]), side([2, 4]))
    path = Path(
        torch.tensor([-0.5, -1.0, -3.0], dtype=DOUBLE, requires_grad=True),
        torch.tensor([-2.0, -3.0], dtype=DOUBLE),
        boundary_s=torch.tensor([-9.0, -9.0, -1.0], dtype=DOUBLE, requires_grad=True),
        boundary_t=torch.tensor([-9.0, -0.5], dtype=DOUBLE),
    )
    loss = alm(**options)(path, alignment)[0].loss
    gradients = torch.autograd.grad(loss.sum(), (path.logp_s, path.boundary_s))
    assert loss.abs().max() < 1e-12
    assert all(g.abs().max() < 1e-12 for g in gradients)
    assert alm()(path, alignment)[0].loss[0] > 1e-3


def test_equal_vocabularies_compare_token_by_token() -> None:
    alignment = aligned(side([1, 3, 4], stopped=[0]), side([1, 3, 4], stopped=[0]))
    logp_s, logp_t = torch.tensor([-1.0, -0.2, -3.0]), torch.tensor([-0.5, -0.2, -0.1])
    losses = alm(tau=1.0)(Path(logp_s, logp_t), alignment)[0].loss
    expected = [coin(s, t, 1.0, "kl") for s, t in zip(logp_s.tolist(), logp_t.tolist(), strict=True)]
    assert losses.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "tvd"])
@pytest.mark.parametrize("tau", [1.0, 100.0, None])
@pytest.mark.parametrize("options", [{}, {"chunks": "outcome"}, {"noncanonical": "boundary"}], ids=str)
def test_the_gradient_is_the_derivative(divergence: str, tau: float | None, options: dict[str, Any]) -> None:
    alignment = random_alignment(3)
    path = random_path(alignment, 3)
    objective = alm(tau=tau, divergence=divergence, **options)

    def loss(logp: Tensor, boundary: Tensor) -> Tensor:
        return objective(replace(path, logp_s=logp, boundary_s=boundary), alignment)[0].loss

    assert torch.autograd.gradcheck(loss, (path.logp_s, path.boundary_s))


def test_the_gradient_of_the_closed_form_is_the_quotient_of_surprisals_less_one() -> None:
    logp_s = torch.tensor([-2.0, -0.5], dtype=DOUBLE, requires_grad=True)
    event_divergence(logp_s, torch.tensor([-1.0, -4.0], dtype=DOUBLE), None, "kl").sum().backward()
    assert logp_s.grad is not None and logp_s.grad.tolist() == pytest.approx([-0.5, 7.0])


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "tvd"])
@pytest.mark.parametrize("tau", [0.5, 100.0, None])
def test_certain_and_impossible_events_stay_finite_in_float32(divergence: str, tau: float | None) -> None:
    ends = torch.tensor([0.0, -1e-8, -2e-6, -1e-3, -1.0, -80.0, -1e5, -math.inf])
    logp_s, logp_t = torch.cartesian_prod(ends, ends).unbind(-1)
    logp_s = logp_s.clone().requires_grad_()
    loss = event_divergence(logp_s, logp_t, tau, divergence)
    loss.sum().backward()
    assert loss.isfinite().all() and loss.min() >= -1e-4
    assert logp_s.grad is not None and logp_s.grad.isfinite().all()


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "tvd"])
@pytest.mark.parametrize("tau", [1.0, 100.0, None])
def test_float32_agrees_with_float64(divergence: str, tau: float | None) -> None:
    generator = torch.Generator().manual_seed(1)
    logp_s, logp_t = (-(torch.rand(200, generator=generator) * 14 - 9).exp() for _ in range(2))
    exact = event_divergence(logp_s.double(), logp_t.double(), tau, divergence)
    torch.testing.assert_close(event_divergence(logp_s, logp_t, tau, divergence).double(), exact, rtol=1e-4, atol=2e-5)


def test_log1mexp_is_accurate_at_both_ends() -> None:
    x = torch.tensor([1e-9, 1e-3, 0.5, 0.69, 0.7, 3.0, 30.0], dtype=DOUBLE, requires_grad=True)
    expected = [math.log(-math.expm1(-v)) if v < 1 else math.log1p(-math.exp(-v)) for v in x.tolist()]
    assert log1mexp(x).tolist() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(log1mexp, (x[1:].detach().requires_grad_(),))


def test_outcomes_of_gamma_zero_are_single_chunks_with_their_boundary() -> None:
    alignment = random_alignment(4)
    path = random_path(alignment, 4)
    outcome = alm(chunks="outcome", gamma=0.0)(path, alignment)[0].loss
    assert torch.equal(outcome, alm(noncanonical="boundary")(path, alignment)[0].loss)
    assert not torch.allclose(outcome, alm(chunks="outcome", gamma=0.3)(path, alignment)[0].loss)


def test_a_merge_stops_before_an_inexact_chunk_and_at_the_end_of_its_segment() -> None:
    """Chunks 0 1 | 2 (inexact) | 3 4, then a segment of 5: no boundary is ever likely enough."""
    student = side([1, 2, 3, 4, 5], [1], inexact=[2])
    alignment = aligned(student, side([1, 2, 3, 4, 5], [1]))
    rare = torch.full((6,), -8.0, dtype=DOUBLE)
    path = Path(torch.full((6,), -1.0, dtype=DOUBLE), torch.full((6,), -2.0, dtype=DOUBLE), boundary_s=rare)
    values, mask = alm(chunks="outcome", tau=None)(replace(path, boundary_t=rare), alignment)
    assert (values.loss != 0).tolist() == [False, True, False, False, True, True]
    assert mask.tolist() == values.metrics["compared"].bool().tolist() == [True, True, False, True, True, True]
    assert values.loss[[1, 4, 5]].tolist() == pytest.approx(
        [coin(-10, -12, None, "kl"), coin(-2, -4, None, "kl"), coin(-1, -2, None, "kl")]
    )


def test_planted_faults_change_the_values() -> None:
    """Boundaries read one row off, a chunk shifted by a token, a stop that is dropped: each is seen."""
    alignment = aligned(side([1, 2, 4, 5, 6], stopped=[0]), side([2, 3, 4, 5, 6], stopped=[0]))
    path = random_path(alignment, 5)
    right = alm(noncanonical="boundary")(path, alignment)[0].loss
    off_by_one = replace(path, boundary_s=path.boundary_s.roll(1))
    assert not torch.allclose(alm(noncanonical="boundary")(off_by_one, alignment)[0].loss, right)
    shifted = replace(alignment, chunk_s=torch.tensor([0, 1, 1, 2, 3]))
    assert not torch.allclose(alm()(path, shifted)[0].loss, alm()(path, alignment)[0].loss)
    stopless = replace(path, logp_t=path.logp_t.clone().index_fill(0, torch.tensor([4]), 0.0))
    assert alm()(stopless, alignment)[0].loss[-1] != alm()(path, alignment)[0].loss[-1]


def test_no_gradient_reaches_the_teacher() -> None:
    alignment = random_alignment(6)
    path = random_path(alignment, 6)
    path.logp_t.requires_grad_(), path.boundary_t.requires_grad_()
    alm(chunks="outcome")(path, alignment)[0].loss.sum().backward()
    assert path.logp_t.grad is None and path.boundary_t.grad is None
    assert path.logp_s.grad is not None and path.boundary_s.grad is not None


def test_boundaries_are_read_only_where_an_option_asks() -> None:
    assert not alm().reads_boundaries and not alm(noncanonical="mask").reads_boundaries
    assert alm(chunks="outcome").reads_boundaries and alm(chunks="threshold").reads_boundaries
    assert alm(noncanonical="boundary").reads_boundaries
    alignment = random_alignment(7)
    bare = Path(random_path(alignment, 7).logp_s, random_path(alignment, 7).logp_t)
    assert alm()(bare, alignment)[0].loss.isfinite().all()
    with pytest.raises(ConfigError, match="'alm' reads boundary masses"):
        alm(chunks="outcome")(bare, alignment)
    with pytest.raises(ConfigError, match=r"path\.noncanonical"):
        alm(noncanonical="mask")(bare, alignment)


@pytest.mark.parametrize("options", [{}, {"chunks": "outcome"}, {"chunks": "threshold"}], ids=str)
def test_nothing_written_gives_no_values(options: dict[str, Any]) -> None:
    none = replace(random_alignment(8))
    empty = {k: v[:0] for k, v in vars(none).items() if isinstance(v, Tensor)}
    nothing = torch.zeros(0)
    values, mask = alm(**options)(
        Path(nothing, nothing, boundary_s=nothing, boundary_t=nothing), replace(none, num_segments=0, **empty)
    )
    assert len(values.loss) == len(mask) == len(values.metrics["compared"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0}, "tau=0.0"),
        ({"divergence": "jsd"}, "divergence='jsd' is unknown: choose one of kl, reverse_kl, tvd"),
        ({"chunks": "words"}, "chunks='words'"),
        ({"noncanonical": "drop"}, "noncanonical='drop'"),
        ({"gamma": 2.0}, "gamma=2.0"),
        ({"threshold": -1.0}, "threshold=-1.0"),
        ({"chunks": "outcome", "noncanonical": "boundary"}, "would do it twice"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        alm(**options)
