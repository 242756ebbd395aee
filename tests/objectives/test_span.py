"""The span policy gradient: returns, credit, clipping, and that its expected gradient is that of the reverse KL."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diglot.alignment import Side, align
from diglot.objectives.span import (
    clipped_policy_gradient,
    discounted_returns,
    remaining_chunks,
    span_advantages,
    suffix_in_chunk,
)


def side(*segments: list[int]) -> Side:
    end = np.array([e for s in segments for e in s], dtype=np.int64)
    segment = np.array([k for k, s in enumerate(segments) for _ in s], dtype=np.int64)
    return Side(end=end, segment=segment, exact=np.ones(len(end), bool), stop=np.zeros(len(end), bool))


def aligned(student: list[list[int]], teacher: list[list[int]]):
    return align(side(*student), side(*teacher), len(student)).to("cpu")


def recursion(rewards: list[float], segment: list[int], gamma: float) -> list[float]:
    """G_k = r_k + gamma G_{k+1}, written as the definition."""
    out = [0.0] * len(rewards)
    for k in reversed(range(len(rewards))):
        later = out[k + 1] if k + 1 < len(rewards) and segment[k + 1] == segment[k] else 0.0
        out[k] = rewards[k] + gamma * later
    return out


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=9), min_size=1, max_size=4), st.floats(0, 1))
def test_returns_equal_the_recursion(rewards: list[list[float]], gamma: float) -> None:
    flat = [r for s in rewards for r in s]
    segment = [k for k, s in enumerate(rewards) for _ in s]
    returns = discounted_returns(torch.tensor(flat, dtype=torch.float64), torch.tensor(segment), gamma)
    assert returns.tolist() == pytest.approx(recursion(flat, segment, gamma), abs=1e-9)


def test_w51_long_texts_keep_their_returns_under_a_discount() -> None:
    """Position 100 of 1,200 at gamma 0.9 has return 10, not 10 * 0.9 ** 100, and nothing is NaN."""
    returns = discounted_returns(torch.ones(1200, dtype=torch.float64), torch.zeros(1200, dtype=torch.int64), 0.9)
    assert returns[100].item() == pytest.approx(10.0, rel=1e-9)
    assert torch.isfinite(returns).all()


def test_w52_length_normalisation_acts_at_every_gamma() -> None:
    """A return is divided by the number of chunks that it could sum, at gamma 0 as well."""
    alignment = aligned([[1, 2, 3]], [[1, 2, 3]])
    logp_s, logp_t = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-2.0, -3.0, -5.0])
    for gamma in (0.0, 0.5):
        plain = span_advantages(logp_s, logp_t, alignment, gamma=gamma, length_normalization=False)
        normal = span_advantages(logp_s, logp_t, alignment, gamma=gamma, length_normalization=True)
        assert torch.allclose(normal, plain / torch.tensor([3.0, 2.0, 1.0]))


def test_remaining_chunks_count_down_to_one_in_each_segment() -> None:
    assert remaining_chunks(torch.tensor([0, 0, 0, 1, 2, 2])).tolist() == [3, 2, 1, 1, 2, 1]


def test_w50_advantages_carry_no_gradient() -> None:
    alignment = aligned([[1, 2]], [[1, 2]])
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    assert not span_advantages(
        logp, torch.tensor([-1.5, -1.0]), alignment, gamma=1.0, length_normalization=False
    ).requires_grad


def test_advantage_is_positive_where_the_teacher_likes_the_text_better() -> None:
    """The sign: a token that the teacher finds likelier must be pushed up by minimising the surrogate."""
    alignment = aligned([[2, 3]], [[2, 3]])
    logp = torch.tensor([-3.0, -1.0], requires_grad=True)
    advantage = span_advantages(logp, torch.tensor([-1.0, -2.0]), alignment, gamma=0.0, length_normalization=False)
    assert advantage.tolist() == [2.0, -1.0]
    clipped_policy_gradient(logp, logp.detach(), advantage, 0.2)[0].sum().backward()
    assert logp.grad is not None and logp.grad.tolist() == [-2.0, 1.0]


def test_terms_of_earlier_tokens_of_a_chunk_are_dropped() -> None:
    """One teacher token against three student tokens: token i keeps log-probs from i on only."""
    alignment = aligned([[1, 2, 3]], [[3]])
    logp_s = torch.tensor([-1.0, -2.0, -4.0])
    advantages = span_advantages(logp_s, torch.tensor([-3.0]), alignment, gamma=1.0, length_normalization=False)
    assert advantages.tolist() == [-3 + 7, -3 + 6, -3 + 4]
    assert suffix_in_chunk(logp_s, alignment.chunk_s, 1).tolist() == [-7, -6, -4]


def test_what_a_single_step_explains_is_not_rewarded_again() -> None:
    """One-to-one tokens keep the discounted long part; in a chunk, later steps and what no step explains."""
    alignment = aligned([[1, 2]], [[1, 2]])
    logp_s, logp_t = torch.tensor([-1.0, -1.0]), torch.tensor([-3.0, -4.0])
    options = dict(gamma=0.5, length_normalization=False)
    advantages = span_advantages(logp_s, logp_t, alignment, explained=logp_t - logp_s, **options)  # type: ignore[arg-type]
    assert advantages.tolist() == [0.5 * -3.0, 0.0]
    logp_s, logp_t = torch.tensor([-1.0, -2.0, -4.0, -1.0]), torch.tensor([-3.0, -3.0])
    steps = torch.tensor([0.5, torch.nan, -1.0, -2.5])
    chunks = aligned([[1, 2, 3, 4]], [[3, 4]])  # chunks of log-ratios 4 and -2, of which 4.5 and 0.5 are unexplained
    advantages = span_advantages(logp_s, logp_t, chunks, explained=steps, gamma=1.0, length_normalization=False)
    assert advantages.tolist() == [4.5 - 1 - 2, 4.5 - 1 - 2, 4.5 - 2, 4.5 + 0.5]


def test_unaligned_tokens_have_no_advantage() -> None:
    alignment = aligned([[1, 2, 9]], [[1, 2]])
    advantages = span_advantages(
        torch.full((3,), -1.0), torch.full((2,), -2.0), alignment, gamma=1.0, length_normalization=False
    )
    assert advantages[2] == 0 and advantages[0] != 0


def test_rewards_are_clipped_on_both_sides() -> None:
    alignment = aligned([[1, 2]], [[1, 2]])
    advantages = span_advantages(
        torch.tensor([-500.0, 0.0]),
        torch.tensor([0.0, -500.0]),
        alignment,
        gamma=0.0,
        length_normalization=False,
        reward_clip=100.0,
    )
    assert advantages.tolist() == [100.0, -100.0]


def test_clipping_stops_the_gradient_beyond_the_range_only() -> None:
    logp = torch.tensor([0.5, 0.5, 0.0], requires_grad=True)
    loss, clipped = clipped_policy_gradient(logp, torch.zeros(3), torch.tensor([1.0, -1.0, 1.0]), 0.2)
    loss.sum().backward()
    assert clipped.tolist() == [True, False, False]
    assert logp.grad is not None and logp.grad[0] == 0 and logp.grad[1] > 0 and logp.grad[2] == -1


def _exact_reverse_kl(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher) over all texts of two student tokens; the teacher reads each text as one token."""
    logp = logits[0].log_softmax(-1)[:, None] + logits[1:].log_softmax(-1)
    return (logp.exp() * (logp - teacher)).sum()


@pytest.mark.parametrize("gamma", [1.0])
def test_expected_gradient_is_that_of_the_reverse_kl(gamma: float) -> None:
    """Summed over all texts with their probabilities the surrogate's gradient equals autograd of the divergence.

    The student spells each text as two of its tokens, the teacher as one: the chunk is never one-to-one.
    """
    torch.manual_seed(0)
    vocabulary = 3
    logits = torch.randn(1 + vocabulary, vocabulary, dtype=torch.float64, requires_grad=True)
    teacher = (
        torch.randn(vocabulary, vocabulary, dtype=torch.float64).flatten().log_softmax(-1).view(vocabulary, vocabulary)
    )
    (exact,) = torch.autograd.grad(_exact_reverse_kl(logits, teacher), logits)

    alignment = aligned([[1, 2]], [[2]])
    expected = torch.zeros_like(logits)
    for a, b in itertools.product(range(vocabulary), repeat=2):
        logp = torch.stack([logits[0].log_softmax(-1)[a], logits[1 + a].log_softmax(-1)[b]])
        advantage = span_advantages(logp, teacher[a, b][None], alignment, gamma=gamma, length_normalization=False)
        loss = clipped_policy_gradient(logp, logp.detach(), advantage.double(), 0.2)[0].sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        expected += logp.detach().sum().exp() * gradient
    assert torch.allclose(expected, exact, atol=1e-6)
