"""Rewards of chunks, their returns, and the credit that each of the student's tokens gets for them.

Shapes: `N_s`, `N_t` packed tokens, `C` chunks. Log-probs in nats. A stop event is a chunk like any other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diglot.alignment import Alignment
from diglot.objectives.base import at_least_float32
from diglot.objectives.chunks import check_choice, chunk_sums, suffix_in_chunk
from diglot.sums import running_sums

CREDITS = ("variance_reduced", "shared", "whole", "uniform", "proportional")


def discounted_returns(rewards: Tensor, segment: Tensor, gamma: float) -> Tensor:
    """`G_k = r_k + gamma * G_{k+1}` inside each segment, [C], for rewards [C] in order of segment.

    By doubling: after step `d` each entry holds the sum of its next `d` rewards, so long texts need logarithmically
    many vector operations, and no power of gamma is ever divided by (absolute-position discounting underflows).
    """
    total, reach, discount = rewards.clone(), 1, gamma
    while reach < segment.numel():  # the longest segment's length would be read from the device
        later = torch.where(segment[reach:] == segment[:-reach], total[reach:], 0.0)
        total = torch.cat([total[:-reach] + discount * later, total[-reach:]])
        reach, discount = reach * 2, discount * discount
    return total


def remaining_chunks(segment: Tensor) -> Tensor:
    """How many chunks of the segment start at or after each chunk, float [C]."""
    last = torch.searchsorted(segment, segment, right=True)  # segments ascend
    return (last - torch.arange(segment.numel(), device=segment.device)).to(torch.float32)


def span_advantages(
    logp_s: Tensor,
    logp_t: Tensor,
    alignment: Alignment[Tensor],
    *,
    gamma: float,
    length_normalization: bool,
    reward_clip: float = 100.0,
    explained: Tensor | None = None,
    credit: str = "variance_reduced",
    prompt: Tensor | None = None,
    shares: Tensor | None = None,
    bonus: Tensor | None = None,
    usable: Tensor | None = None,
) -> Tensor:
    """Advantage of each student token, [N_s], without gradient.

    The reward of chunk `k` is `A_k = l^T_k - l^S_k`, the difference of both log-likelihoods of its bytes. A token's
    advantage is its own part of its chunk's reward plus `gamma * G_{k+1}`.

    Args:
        credit: the token's own part.
            "variance_reduced": `A_k` without the student's log-probs of the tokens that came before in the chunk. They
            do not depend on this token, so they add noise of mean zero.
            "shared": `A_k` for each token. Both have the expected gradient of the reverse KL at gamma 1 if later bytes
            do not decide where chunks end; where they do, and for gamma below 1, only nearly.
            "whole": the rewards of the whole segment, but for the student's log-probs of the tokens before. Its
            expected gradient is always that of the reverse KL, at more variance; needs gamma 1, and no chunk is
            clipped. With `prompt` less the mean of what the other replies to its prompt were worth at the same place,
            or at their end if they ended before: none of them knows this token, so nothing is biased, and most of the
            variance goes. "uniform": `A_k / |S_k|`. Adds up to `A_k` over the chunk, weighs long chunks down: biased.
            "proportional": `A_k log p_i / l^S_k`, which is `(l^T_k / l^S_k - 1) log p_i` (DPCA). Adds up to `A_k`; goes
            to tokens that the student found surprising, and is large where `l^S_k` is near 0: biased.
        prompt: which prompt each segment answers, int64 [segments], where they are the student's own samples.
        shares: log-probs [N_s] by which "proportional" divides, where `logp_s` are not plain log-probs.
        bonus: added to each chunk's reward, [C].
        usable: which chunks are rewarded, bool [C]; the exact ones if not given.
        explained: what a single-step divergence beside the policy gradient says of each token (`Objective.explained`),
            [N_s], NaN where it says nothing. It is a control variate: a token is credited with what the steps behind
            it say, and with all that no step explains of the whole segment. At gamma 1, with no chunk clipped, both
            parts together have the expected gradient of the reverse KL, whatever the targets of the steps are.
            `credit` has no part in it.
        length_normalization: divide by the number of chunks that the sum ranges over (MiniLLM, section 2.2).
        reward_clip: each chunk's reward is clipped to `[-reward_clip, reward_clip]` nats.
    """
    check_choice("credit", credit, CREDITS)
    logp_s, logp_t = at_least_float32(logp_s.detach()), at_least_float32(logp_t.detach())
    if not alignment.num_chunks:
        return torch.zeros_like(logp_s)
    chunk_s, segment = alignment.chunk_s, alignment.chunk_segment
    usable = alignment.chunk_exact if usable is None else usable
    gain = chunk_sums(logp_t, alignment.chunk_t, alignment.num_chunks)
    gain = gain if bonus is None else gain + bonus
    ratio = gain - chunk_sums(logp_s, chunk_s, alignment.num_chunks)
    rewards = ratio.clamp(-reward_clip, reward_clip)
    rewards = torch.where(usable, rewards, 0.0)
    future = gamma * _next_in_segment(discounted_returns(rewards, segment, gamma), segment)

    chunk = chunk_s.clamp(min=0)
    scored = (chunk_s >= 0) & usable[chunk]
    if explained is not None:
        explained = explained.to(ratio)
        own = _unexplained(ratio, explained, alignment, usable, reward_clip)
    elif credit == "whole":
        own = _whole(gain, logp_s, alignment, usable, scored, prompt)
        future = torch.zeros_like(future)
    elif credit == "variance_reduced":
        own = gain[chunk] - suffix_in_chunk(logp_s, chunk_s, alignment.num_chunks)
        own = own.clamp(-reward_clip, reward_clip)
    else:
        by = logp_s if shares is None else at_least_float32(shares.detach())
        own = rewards[chunk] * _share(credit, by, alignment)
    count = remaining_chunks(segment)[chunk] if length_normalization else torch.ones_like(own)
    if explained is not None and length_normalization:
        count = torch.where(explained.isnan(), count, (count - 1).clamp(min=1))
    return torch.where(scored, (own + future[chunk]) / count, 0.0)


def _unexplained(ratio: Tensor, explained: Tensor, alignment: Alignment[Tensor], usable: Tensor, clip: float) -> Tensor:
    """What the single steps do not say, but for chunks behind the token's own, `[N_s]`.

    The steps of later tokens of its chunk, and the log-ratios of all chunks up to its own less the steps in them. The
    past is in it since a token may decide where the teacher's tokens before it end. Steps of the past are not: they
    depend on nothing that comes later.
    """
    chunk, segment = alignment.chunk_s.clamp(min=0), alignment.chunk_segment
    steps = explained.nan_to_num(nan=0.0)
    left = (ratio - chunk_sums(steps, alignment.chunk_s, alignment.num_chunks)).clamp(-clip, clip)
    left = torch.where(usable, left, 0.0).double()
    of_segment = left.new_zeros(alignment.num_segments).index_add(0, segment, left)
    so_far = (running_sums(left) - (running_sums(of_segment) - of_segment)[segment]).to(ratio.dtype)
    later = suffix_in_chunk(steps, alignment.chunk_s, alignment.num_chunks) - steps
    return so_far[chunk] + later


def _whole(
    gain: Tensor, logp_s: Tensor, alignment: Alignment[Tensor], usable: Tensor, scored: Tensor, prompt: Tensor | None
) -> Tensor:
    """The teacher's log-prob of each token's segment minus the student's of the token and all after it, [N_s]."""
    segment = alignment.chunk_segment
    of_teacher = gain.new_zeros(alignment.num_segments).index_add(0, segment[usable], gain[usable])
    token_segment = segment[alignment.chunk_s.clamp(min=0)]
    masked = torch.where(scored, logp_s, 0.0).double()
    totals = masked.new_zeros(alignment.num_segments).index_add(0, token_segment, masked)
    # Tokens are in order of segment, so what lies before a segment is the sum of the segments before.
    before = running_sums(masked) - masked - (running_sums(totals) - totals)[token_segment]
    whole = of_teacher[token_segment] - (totals[token_segment] - before).to(logp_s.dtype)
    if prompt is None:
        return whole
    others = _of_others(whole[scored], of_teacher, token_segment[scored], prompt)
    return whole.index_put((scored.nonzero()[:, 0],), -others, accumulate=True)


def _of_others(whole: Tensor, at_end: Tensor, segment: Tensor, prompt: Tensor) -> Tensor:
    """For each token the mean of `whole` at its place in the other segments with its prompt, 0 without others, [N_s].

    Behind its last token a segment is worth `at_end`, [segments].
    """
    sizes = torch.bincount(segment, minlength=len(at_end))
    place = torch.arange(len(segment), device=segment.device) - (sizes.cumsum(0) - sizes)[segment]
    worth = at_end.double()[:, None].repeat(1, int(sizes.max()))
    worth[segment, place] = whole.double()
    sums = torch.zeros_like(worth).index_add(0, prompt, worth)[prompt]
    others = replies(prompt)[:, None] - 1
    return ((sums - worth) / others.clamp(min=1) * (others > 0))[segment, place].to(whole.dtype)


def replies(prompt: Tensor) -> Tensor:
    """How many segments have the prompt of each, [segments]."""
    return torch.bincount(prompt)[prompt]


def _share(credit: str, logp: Tensor, alignment: Alignment[Tensor]) -> Tensor:
    """Which part of its chunk's reward each token gets, [N_s]. Parts of a chunk add up to 1 unless `shared`."""
    if credit == "shared":
        return torch.ones_like(logp)
    chunk = alignment.chunk_s.clamp(min=0)
    even: Tensor = 1.0 / alignment.count_s[chunk].to(logp.dtype)
    if credit == "uniform":
        return even
    total = chunk_sums(logp, alignment.chunk_s, alignment.num_chunks)[chunk]
    # A chunk that the student is certain of has no surprise to divide by: each of its tokens gets the same.
    certain = total == 0
    return torch.where(certain, even, logp / torch.where(certain, 1.0, total))


def _next_in_segment(values: Tensor, segment: Tensor) -> Tensor:
    """`values[k + 1]` where that is the same segment, else 0, [C]."""
    if values.numel() < 2:
        return torch.zeros_like(values)
    return torch.cat([torch.where(segment[1:] == segment[:-1], values[1:], 0.0), values.new_zeros(1)])
