"""Reverse KL between the laws of two models over text, by policy gradient on aligned chunks.

MiniLLM (arXiv 2306.08543) with tokens replaced by chunks, the shortest pieces of text at whose ends both
tokenizers have a boundary. With equal vocabularies a chunk is a token and everything below is the paper's.

Shapes: `N_s`, `N_t` packed tokens, `C` chunks, `S` segments. Log-probs in nats. A stop event is a chunk like any other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diglot.alignment import Alignment
from diglot.objectives.base import Path, PathObjective, Values
from diglot.objectives.rungs import Rung


def chunk_sums(values: Tensor, chunk: Tensor, num_chunks: int) -> Tensor:
    """Sum of token values over each chunk, [C]; tokens in no chunk (-1) are left out."""
    inside = chunk >= 0
    return values.new_zeros(num_chunks).index_add(0, chunk[inside], values[inside])


def suffix_in_chunk(logp: Tensor, chunk: Tensor, num_chunks: int) -> Tensor:
    """For token `i` the sum of `logp` from `i` to the end of its chunk, [N_s]. Tokens of a chunk are consecutive."""
    exact = logp.double()
    inside = chunk >= 0
    kept = torch.where(inside, exact, 0.0)
    total = kept.cumsum(0)
    # Log-probs are at most 0, so the running sum is lowest at the chunk's last token.
    end = exact.new_zeros(num_chunks).scatter_reduce(0, chunk[inside], total[inside], "amin", include_self=False)
    if not num_chunks:
        return torch.zeros_like(logp)
    return torch.where(inside, end[chunk.clamp(min=0)] - (total - kept), 0.0).to(logp.dtype)


def discounted_returns(rewards: Tensor, segment: Tensor, gamma: float) -> Tensor:
    """`G_k = r_k + gamma * G_{k+1}` inside each segment, [C], for rewards [C] in order of segment.

    By doubling: after step `d` each entry holds the sum of its next `d` rewards, so long texts need logarithmically
    many vector operations, and no power of gamma is ever divided by (absolute-position discounting underflows).
    """
    total, reach, discount = rewards.clone(), 1, gamma
    longest = int(torch.bincount(segment).max()) if segment.numel() else 0
    while reach < longest:
        later = torch.where(segment[reach:] == segment[:-reach], total[reach:], 0.0)
        total = torch.cat([total[:-reach] + discount * later, total[-reach:]])
        reach, discount = reach * 2, discount * discount
    return total


def remaining_chunks(segment: Tensor) -> Tensor:
    """How many chunks of the segment start at or after each chunk, float [C]."""
    counts = torch.bincount(segment) if segment.numel() else segment
    last = counts.cumsum(0)[segment] if segment.numel() else segment
    return (last - torch.arange(segment.numel(), device=segment.device)).to(torch.float32)


def span_advantages(
    logp_s: Tensor,
    logp_t: Tensor,
    alignment: Alignment,
    *,
    gamma: float,
    length_normalization: bool,
    reward_clip: float = 100.0,
    dense: Tensor | None = None,
) -> Tensor:
    """Advantage of each student token, [N_s], without gradient.

    The reward of chunk `k` is `l^T_k - l^S_k`, the difference of both log-likelihoods of its bytes. A token's
    advantage is its own chunk's part plus `gamma * G_{k+1}`. Inside a chunk, terms of tokens that came before are
    dropped: they do not depend on this token, so their contribution has mean zero (the variance-reduced form; shared
    credit has the same expectation at gamma = 1).

    Args:
        dense: bool [N_s], tokens whose own chunk is covered by an exact single-step divergence. Their advantage is
            the long part only, `gamma * G_{k+1}` (paper, eq. 5).
        length_normalization: divide by the number of chunks that the sum ranges over (paper, section 2.2).
        reward_clip: each chunk's reward is clipped to `[-reward_clip, reward_clip]` nats.
    """
    logp_s, logp_t = logp_s.detach().float(), logp_t.detach().float()
    chunks = alignment.chunk_segment.numel()
    in_teacher = chunk_sums(logp_t, alignment.chunk_t, chunks)
    rewards = (in_teacher - chunk_sums(logp_s, alignment.chunk_s, chunks)).clamp(-reward_clip, reward_clip)
    rewards = torch.where(alignment.chunk_exact, rewards, 0.0)
    segment = alignment.chunk_segment
    future = gamma * _next_in_segment(discounted_returns(rewards, segment, gamma), segment)

    chunk = alignment.chunk_s.clamp(min=0)
    own = (in_teacher[chunk] - suffix_in_chunk(logp_s, alignment.chunk_s, chunks)).clamp(-reward_clip, reward_clip)
    count = remaining_chunks(segment)[chunk] if length_normalization else torch.ones_like(own)
    if dense is not None:
        own = torch.where(dense, 0.0, own)
        count = torch.where(dense, (count - 1).clamp(min=1), count) if length_normalization else count
    usable = alignment.in_exact_chunk(alignment.chunk_s)
    return torch.where(usable, (own + future[chunk]) / count, 0.0) if chunks else torch.zeros_like(logp_s)


def _next_in_segment(values: Tensor, segment: Tensor) -> Tensor:
    """`values[k + 1]` where that is the same segment, else 0, [C]."""
    if values.numel() < 2:
        return torch.zeros_like(values)
    return torch.cat([torch.where(segment[1:] == segment[:-1], values[1:], 0.0), values.new_zeros(1)])


def clipped_policy_gradient(
    logp: Tensor, logp_old: Tensor, advantage: Tensor, epsilon: float, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate for each token, [N], to be minimised, and which tokens were clipped, bool [N].

    `weight` are importance weights of teacher-mixed sampling; they multiply the ratio, as in the authors' code.
    At `logp == logp_old` and `weight` 1 the gradient is that of `-advantage * logp`.
    """
    ratio = (logp - logp_old).exp()
    if weight is not None:
        ratio = ratio * weight
    plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - epsilon, 1 + epsilon)
    return torch.maximum(plain, clipped), clipped > plain


class Span(PathObjective):
    """Policy-gradient reverse KL as an objective of its own: needs only log-probs of the text from the teacher.

    One value per student token. The value itself is a surrogate: its gradient is the estimate, its size means
    nothing. The metric `advantage` is what each token was credited with, in nats.
    """

    name = "span"
    needs = Rung.TEXT_LOGPROBS

    def __init__(
        self, gamma: float = 1.0, length_normalization: bool = False, reward_clip: float = 100.0, epsilon: float = 0.2
    ) -> None:
        self.gamma, self.length_normalization = gamma, length_normalization
        self.reward_clip, self.epsilon = reward_clip, epsilon

    def __call__(self, path: Path, alignment: Alignment) -> tuple[Values, Tensor]:
        old = path.logp_s.detach() if path.logp_old is None else path.logp_old
        advantage = span_advantages(
            old,
            path.logp_t,
            alignment,
            gamma=self.gamma,
            length_normalization=self.length_normalization,
            reward_clip=self.reward_clip,
        )
        loss, _ = clipped_policy_gradient(path.logp_s, old, advantage, self.epsilon, path.weight)
        return Values(loss, {"advantage": advantage}), alignment.chunk_s >= 0
