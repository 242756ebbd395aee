"""Weighted sums of row objectives against the same written on whole logits with autograd."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from support.row_problem import OBJECTIVE, ROWS_S, ROWS_T, WEIGHT, N, Problem, V, linear, normal
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from diglot.errors import ConfigError
from diglot.heads import Head, default_chunk_rows, last_hidden, reduce_rows
from diglot.objectives import Pair, Values, make_objective

HEADS = {"plain": {}, "scale": {"scale": 0.3}, "softcap": {"softcap": 1.5}, "both": {"scale": 2.0, "softcap": 3.0}}


@pytest.mark.parametrize("head", sorted(HEADS))
@pytest.mark.parametrize("chunk_rows", [1, 2, 4, 9, 100])
def test_value_and_gradients_are_those_of_whole_logits_for_every_block_size(chunk_rows: int, head: str) -> None:
    problem = Problem(**HEADS[head])
    total, values = problem.reduced(chunk_rows)
    expected, plain = problem.plain()
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(values.loss, plain.loss.detach(), rtol=1e-12, atol=1e-12)
    assert values.metrics.keys() == plain.metrics.keys()
    for name, metric in plain.metrics.items():
        torch.testing.assert_close(values.metrics[name], metric, rtol=1e-12, atol=1e-12)
    for gradient, reference in zip(problem.gradients(total), problem.gradients(expected), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_rows", [1, 2, 4])
def test_float32_does_not_depend_on_the_block_size(chunk_rows: int) -> None:
    problem = Problem(torch.float32)
    whole, blockwise = problem.reduced(100)[0], problem.reduced(chunk_rows)[0]
    assert blockwise.item() == pytest.approx(whole.item(), rel=1e-6)
    for gradient, reference in zip(problem.gradients(blockwise), problem.gradients(whole), strict=True):
        assert (gradient - reference).abs().max() <= 1e-6 * reference.abs().max()


@pytest.mark.parametrize("chunk_rows", [3, 100])
def test_the_gradient_is_the_derivative(chunk_rows: int) -> None:
    problem = Problem(softcap=4.0)
    module = problem.head_s.module

    def value(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        module.weight, module.bias = nn.Parameter(weight), nn.Parameter(bias)  # type: ignore[assignment]
        head = _WithParameters(module, (weight, bias))
        return reduce_rows(
            OBJECTIVE, hidden, head, problem.hidden_t, problem.head_t, ROWS_S, ROWS_T, problem.weight, chunk_rows
        )[0]

    class Anew(torch.autograd.Function):
        """The value; its gradient is taken of a new one each time, since it can be taken once only."""

        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Tensor:
            ctx.save_for_backward(*inputs)
            return value(*inputs).detach()

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> Any:
            leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            with torch.enable_grad():
                return torch.autograd.grad(value(*leaves), leaves, grad_output)

    inputs = [x.detach().clone().requires_grad_() for x in problem.inputs]
    assert torch.autograd.gradcheck(Anew.apply, inputs)


def test_a_gradient_that_was_handed_over_is_not_handed_over_again() -> None:
    total, _ = Problem().reduced(4)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        total.backward()


class _WithParameters(Head):
    """A head whose parameters are given tensors, so that a numeric check can move them."""

    def __init__(self, module: nn.Module, tensors: tuple[Tensor, ...]) -> None:
        super().__init__(module, softcap=4.0)
        self.tensors = tensors

    @property
    def parameters(self) -> Any:
        return self.tensors


def test_rows_of_weight_zero_and_rows_that_are_not_asked_for_get_exactly_no_gradient() -> None:
    problem = Problem()
    gradient = problem.gradients(problem.reduced(4)[0])[0]
    read = torch.zeros(N, dtype=torch.bool)
    read[ROWS_S[WEIGHT != 0]] = True
    assert (gradient[~read] == 0).all()
    assert (gradient[read] != 0).any(-1).all()


def test_an_infinite_loss_of_weight_zero_leaves_the_sum_finite() -> None:
    def infinite_at_zero_weight(logits_s: Tensor, logits_t: Tensor) -> Values:
        values = OBJECTIVE(logits_s, logits_t)
        return Values(values.loss.masked_fill(WEIGHT == 0, float("inf")), values.metrics)

    problem = Problem()
    total, values = problem.reduced(100, infinite_at_zero_weight)
    assert values.loss.isinf().sum() == 2
    torch.testing.assert_close(total, problem.plain()[0])
    assert all(g.isfinite().all() for g in problem.gradients(total))


def test_a_row_that_is_read_twice_gets_both_gradients() -> None:
    problem = Problem()
    twice = torch.tensor([3, 3, 3])
    rows = (problem.hidden_s, problem.head_s, problem.hidden_t, problem.head_t, twice, torch.tensor([0, 1, 1]))
    total, _ = reduce_rows(OBJECTIVE, *rows, torch.ones(3), 2)
    values = OBJECTIVE(problem.head_s(problem.hidden_s[twice]), problem.head_t(problem.hidden_t[[0, 1, 1]]).detach())
    for gradient, reference in zip(problem.gradients(total), problem.gradients(values.loss.sum()), strict=True):
        torch.testing.assert_close(gradient, reference)


def test_the_gradient_scales_with_what_follows() -> None:
    problem = Problem()
    total, _ = problem.reduced(4)
    expected, _ = problem.plain()
    for gradient, reference in zip(problem.gradients(total * -2.5), problem.gradients(expected * -2.5), strict=True):
        torch.testing.assert_close(gradient, reference)


def test_hooks_of_the_parameters_see_one_whole_gradient() -> None:
    problem, seen = Problem(), []
    problem.head_s.module.weight.register_hook(seen.append)
    problem.reduced(2)[0].backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], problem.gradients(problem.plain()[0])[1])


def test_a_parameter_that_the_logits_do_not_depend_on_gets_zeros() -> None:
    problem = Problem()
    problem.head_s.module.register_parameter("idle", nn.Parameter(torch.ones(2)))
    problem.reduced(4)[0].backward()
    assert problem.head_s.module.idle.grad.tolist() == [0.0, 0.0]


def test_no_rows_give_zero_that_is_still_part_of_the_graph() -> None:
    problem, none = Problem(), torch.zeros(0, dtype=torch.int64)
    total, values = reduce_rows(
        OBJECTIVE, problem.hidden_s, problem.head_s, problem.hidden_t, problem.head_t, none, none, torch.zeros(0), 4
    )
    assert total.item() == 0
    assert values.loss.shape == (0,)
    assert set(values.metrics) == {"mass_s", "mass_t"}
    assert all((g == 0).all() for g in problem.gradients(total))


def test_without_grad_no_gradient_is_formed() -> None:
    problem = Problem()
    with torch.no_grad():
        total, values = problem.reduced(4)
    assert not total.requires_grad
    torch.testing.assert_close(total, problem.plain()[0].detach())
    problem.hidden_s.requires_grad_(False)
    problem.head_s.module.requires_grad_(False)
    assert not problem.reduced(4)[0].requires_grad
    assert not values.loss.requires_grad


def test_frozen_parts_get_no_gradient_and_the_others_keep_theirs() -> None:
    problem = Problem()
    expected = problem.gradients(problem.plain()[0])
    problem.head_s.module.weight.requires_grad_(False)
    problem.reduced(4)[0].backward()
    assert problem.head_s.module.weight.grad is None
    torch.testing.assert_close(problem.head_s.module.bias.grad, expected[2])
    torch.testing.assert_close(problem.hidden_s.grad, expected[0])
    problem = Problem()
    problem.hidden_s.requires_grad_(False)
    problem.reduced(4)[0].backward()
    assert problem.hidden_s.grad is None
    torch.testing.assert_close(problem.head_s.module.weight.grad, expected[1])


def test_an_objective_without_gradient_gives_zeros() -> None:
    problem = Problem()
    total, _ = problem.reduced(4, lambda s, t: Values(torch.ones(len(s), dtype=s.dtype)))
    assert total.item() == pytest.approx(WEIGHT.sum().item())
    assert all((g == 0).all() for g in problem.gradients(total))


def test_the_teacher_gets_no_gradient() -> None:
    problem = Problem()
    problem.hidden_t.requires_grad_()
    problem.reduced(4)[0].backward()
    assert problem.hidden_t.grad is None
    assert all(p.grad is None for p in problem.head_t.parameters)


def test_equal_models_have_zero_loss_and_zero_gradient() -> None:
    same = Pair(True, V, V, torch.arange(V - 1), torch.arange(V - 1), torch.tensor([V - 1]), torch.tensor([V - 1]))
    problem = Problem()
    for name in ("jsd", "strict"):
        objective = make_objective(name, same)
        total, _ = reduce_rows(
            objective,
            problem.hidden_s,
            problem.head_s,
            problem.hidden_s.detach(),
            problem.head_s,
            ROWS_S,
            ROWS_S,
            torch.ones(len(ROWS_S)),
            4,
        )
        assert abs(total.item()) < 1e-13
        assert all(g.abs().max() < 1e-13 for g in problem.gradients(total))


def test_beta_reaches_the_loss_the_right_way_round() -> None:
    same = Pair(True, 2, 2, torch.tensor([0]), torch.tensor([0]), torch.tensor([1]), torch.tensor([1]))
    identity = nn.Linear(2, 2, bias=False)
    identity.weight.data = torch.eye(2)
    student, teacher = torch.tensor([[0.5, 0.5]]).log().requires_grad_(), torch.tensor([[0.1, 0.9]]).log()
    row = torch.tensor([0])
    # KL(student || teacher) = log(1/2) - (log 0.1 + log 0.9) / 2; KL(teacher || student) = log 2 - entropy(0.1)
    for beta, expected in ((1.0, 0.510826), (0.0, 0.368064)):
        for name in ("jsd", "strict"):
            objective = make_objective(name, same, beta=beta)
            total, _ = reduce_rows(
                objective, student, Head(identity), teacher, Head(identity), row, row, torch.ones(1), 1
            )
            assert total.item() == pytest.approx(expected, abs=1e-5)


def test_a_tied_embedding_gets_both_of_its_gradients_once() -> None:
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).double()
    head, ids = Head.of(model), torch.arange(N)[None] % V
    problem = Problem()

    def gradient(blockwise: bool) -> Tensor:
        model.zero_grad()
        hidden = last_hidden(model, ids, torch.ones_like(ids)).flatten(0, 1)
        if blockwise:
            reduce_rows(OBJECTIVE, hidden, head, problem.hidden_t, problem.head_t, ROWS_S, ROWS_T, problem.weight, 2)[
                0
            ].backward()
        else:
            logits = model(input_ids=ids).logits[0]
            values = OBJECTIVE(logits[ROWS_S], problem.head_t(problem.hidden_t[ROWS_T]).detach())
            (values.loss * problem.weight).sum().backward()
        return model.get_input_embeddings().weight.grad.clone()

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-10, atol=1e-12)


def test_values_that_are_views_of_a_block_do_not_keep_the_block() -> None:
    problem = Problem()
    distributions: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def objective(logits_s: Tensor, logits_t: Tensor) -> Values:
        alive.append(sum(distribution() is not None for distribution in distributions))
        distribution = logits_t.softmax(-1)
        distributions.append(weakref.ref(distribution.untyped_storage()))
        return Values(logits_s.logsumexp(-1), {"last": distribution[:, -1]})

    _, values = problem.reduced(2, objective)
    assert alive == [0] * len(ROWS_S)  # blocks of two rows are compared row by row
    torch.testing.assert_close(values.metrics["last"], problem.plain(objective)[1].metrics["last"])


def test_nothing_as_large_as_all_logits_is_kept_for_the_backward_pass() -> None:
    rows, vocabulary = 200, 150
    pair = Pair(
        True, vocabulary, vocabulary, torch.arange(149), torch.arange(149), torch.tensor([149]), torch.tensor([149])
    )
    head = Head(linear(3, vocabulary, 20))
    hidden = normal(rows, 3, seed=21).requires_grad_()
    index, saved = torch.arange(rows), []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    arguments = (make_objective("jsd", pair), hidden, head, hidden.detach(), head, index, index, torch.ones(rows))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total, _ = reduce_rows(*arguments, 10)
    assert saved
    assert max(saved) <= 10 * vocabulary
    total.backward()
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        reduce_rows(*arguments, rows)
    part = rows // 8  # of a block, for which the objective is evaluated at once
    assert part * (vocabulary - 1) <= max(saved) <= part * vocabulary  # the hook would have seen whole blocks


def test_bfloat16_is_no_worse_than_autograd_on_whole_bfloat16_logits() -> None:
    exact = Problem()
    exact_gradients = exact.gradients(exact.plain()[0])
    low = Problem(torch.bfloat16)
    (total, _), (naive, _) = low.reduced(2), low.plain()
    gradients, reference = low.gradients(total), low.gradients(naive)
    assert total.dtype == torch.float32
    for g, plain, truth in zip(gradients, reference, exact_gradients, strict=True):
        assert g.dtype == torch.bfloat16
        scale = truth.abs().max()
        assert (g - truth).abs().max() <= (plain - truth).abs().max() + 0.01 * scale


def test_the_sum_over_many_blocks_keeps_more_than_bfloat16() -> None:
    """Adding 512 equal bfloat16 gradients one by one in bfloat16 would stop growing long before the end."""
    rows = 512
    hidden = torch.ones(1, 1, dtype=torch.bfloat16)
    module = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    index = torch.zeros(rows, dtype=torch.int64)
    total, _ = reduce_rows(
        lambda s, t: Values(s.sum(-1)), hidden, Head(module), hidden, Head(module), index, index, torch.ones(rows), 1
    )
    total.backward()
    assert module.weight.grad is not None
    assert module.weight.grad.item() == rows


def test_autocast_gives_the_gradients_of_autocast_on_whole_logits() -> None:
    problem = Problem(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = problem.reduced(2)
        expected, _ = problem.plain()
    assert total.item() == pytest.approx(expected.item(), rel=1e-2)
    for gradient, reference in zip(problem.gradients(total), problem.gradients(expected), strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, reference, rtol=0.05, atol=0.02 * float(reference.abs().max()))


def test_arguments_that_do_not_fit_are_named() -> None:
    problem = Problem()
    rows = (problem.hidden_s, problem.head_s, problem.hidden_t, problem.head_t)
    with pytest.raises(ConfigError, match="have 9, 8 and 9 entries"):
        reduce_rows(OBJECTIVE, *rows, ROWS_S, ROWS_T[1:], WEIGHT, 4)
    with pytest.raises(ConfigError, match="chunk_rows=0 forms no row"):
        problem.reduced(0)


def test_default_block_sizes_fit_the_budget() -> None:
    assert default_chunk_rows(32000, 32000, "cpu") == 1152
    assert default_chunk_rows(10**7, 10**7, "cpu") == 32
    small = default_chunk_rows(100, 100, "cpu")
    assert small % 32 == 0
    assert 4 * 100 * small < 512 * 2**20
