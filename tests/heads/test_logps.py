"""Log-probabilities of written tokens against whole logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diglot.heads import Head, token_logps

V, H, N = 13, 5, 12
TARGETS = torch.arange(N) % V
STOP = torch.arange(N) % 5 == 4
STOP_IDS = torch.tensor([3, 11, 12])


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def linear(size_in: int, size_out: int, seed: int, dtype: torch.dtype = torch.float64) -> nn.Linear:
    made = nn.Linear(size_in, size_out, dtype=dtype)
    made.weight.data, made.bias.data = (
        normal(size_out, size_in, seed=seed, dtype=dtype),
        normal(size_out, seed=9, dtype=dtype),
    )
    return made


def plain(hidden: Tensor, head: Head, temperature: float = 1.0) -> Tensor:
    """Row by row from probabilities."""
    p = (head(hidden) / temperature).softmax(-1)
    masses = [row[STOP_IDS].sum() if stop else row[target] for row, stop, target in zip(p, STOP, TARGETS, strict=True)]
    return torch.stack(masses).log()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_rows", [1, 5, 100])
def test_log_probs_and_gradients_are_those_of_whole_logits(chunk_rows: int, temperature: float) -> None:
    head, hidden = Head(linear(H, V, 1), scale=0.8, softcap=5.0), normal(N, H, seed=2).requires_grad_()
    outside = normal(N, seed=3)
    logps = token_logps(hidden, head, TARGETS, STOP, STOP_IDS, chunk_rows, temperature)
    expected = plain(hidden, head, temperature)
    torch.testing.assert_close(logps, expected, rtol=1e-12, atol=1e-12)
    inputs = (hidden, *head.parameters)
    for one, other in zip(
        torch.autograd.grad(logps, inputs, outside), torch.autograd.grad(expected, inputs, outside), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_the_gradient_is_the_derivative() -> None:
    head, hidden = Head(linear(H, V, 1)), normal(N, H, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_logps(x, head, TARGETS, STOP, STOP_IDS, 5), (hidden,))


def test_targets_of_stop_tokens_are_ignored() -> None:
    head, hidden = Head(linear(H, V, 1)), normal(N, H, seed=2)
    elsewhere = TARGETS.masked_fill(STOP, 10**6)
    torch.testing.assert_close(
        token_logps(hidden, head, elsewhere, STOP, STOP_IDS.tolist(), 4),
        token_logps(hidden, head, TARGETS, STOP, STOP_IDS, 4),
    )


def test_stop_and_all_other_ids_share_a_mass_of_one() -> None:
    head, hidden = Head(linear(H, V, 1)), normal(1, H, seed=2).expand(N, H)
    ids = torch.tensor([i for i in range(V) if i not in STOP_IDS.tolist()])
    rows = hidden[: len(ids) + 1]
    stop = torch.arange(len(rows)) == len(ids)
    logps = token_logps(rows, head, torch.cat([ids, ids[:1]]), stop, STOP_IDS, 4)
    assert logps.exp().sum().item() == pytest.approx(1.0)


def test_no_tokens_give_no_log_probs() -> None:
    head, hidden = Head(linear(H, V, 1)), normal(0, H, seed=2).requires_grad_()
    logps = token_logps(hidden, head, TARGETS[:0], STOP[:0], STOP_IDS, 4)
    assert logps.shape == (0,)
    logps.sum().backward()
    assert hidden.grad is not None


def test_without_stop_tokens_no_stop_ids_are_needed() -> None:
    head, hidden = Head(linear(H, V, 1)), normal(N, H, seed=2).requires_grad_()
    logps = token_logps(hidden, head, TARGETS, torch.zeros(N, dtype=torch.bool), [], 4)
    expected = head(hidden).log_softmax(-1).gather(1, TARGETS[:, None])[:, 0]
    torch.testing.assert_close(logps, expected)
    logps.sum().backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


def test_low_precision_gives_float32() -> None:
    head, hidden = Head(linear(H, V, 1, torch.bfloat16)), normal(N, H, seed=2, dtype=torch.bfloat16)
    logps = token_logps(hidden, head, TARGETS, STOP, STOP_IDS, 4)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, plain(hidden, head), rtol=1e-4, atol=1e-5)


def test_nothing_as_large_as_the_logits_of_one_block_is_kept() -> None:
    rows, vocabulary = 100, 400
    head, hidden = Head(linear(3, vocabulary, 1)), normal(rows, 3, seed=2).requires_grad_()
    targets, stop, saved = torch.arange(rows), torch.zeros(rows, dtype=torch.bool), []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logps = token_logps(hidden, head, targets, stop, [1], 10)
    assert max(saved, default=0) < 10 * vocabulary
    logps.sum().backward()
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        head(hidden).logsumexp(-1)
    assert max(saved) >= rows * vocabulary  # the hook would have seen them


def test_autocast_is_the_same_in_both_passes() -> None:
    head, hidden = Head(linear(H, V, 1, torch.float32)), normal(N, H, seed=2, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = token_logps(hidden, head, TARGETS, STOP, STOP_IDS, 4)
        expected = plain(hidden, head)
    inputs = (hidden, *head.parameters)
    for one, other in zip(
        torch.autograd.grad(logps.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.02 * float(other.abs().max()))
