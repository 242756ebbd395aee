"""Teacher-mixed sampling when the vocabularies differ: the teacher writes a prefix, the student goes on.

With probability `alpha` a completion begins with teacher text of random length (uniform over 1 ... `max_new_tokens`
teacher tokens); the student reads its bytes in its own tokens and continues. The chunk at student position `k` is
thus the teacher's with probability `alpha * P(length > k)`.

**Estimator and bias.** Each chunk's term is weighted by `student / (a_k * teacher + (1 - a_k) * student)`, the ratio
of the student's distribution to the mixture for *this* chunk, given what stands before it (`mixture_weight`). As in
the paper
(its approximation of the product of ratios by the last factor), how likely the text before the chunk was is left out,
which biases towards states that the mixture visits; whether the teacher wrote the prefix is treated as independent of
it, a second bias of the same kind. With equal vocabularies tokens are drawn from the mixture itself
(`TeacherMixture`) and only the first bias is left.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from diglot.alignment import Alignment
from diglot.arrays import Ids
from diglot.objectives.span import chunk_sums
from diglot.rendering import Conversation, Renderer
from diglot.rollouts.draws import seeds_of_rows
from diglot.rollouts.sampler import TransformersSampler


def write_prefixes(
    conversations: Sequence[Conversation],
    inside: Sequence[bool],
    teacher: PreTrainedModel,
    renderer_t: Renderer,
    renderer_s: Renderer,
    sampler: TransformersSampler,
    *,
    alpha: float,
    max_new_tokens: int,
    seed: int | Sequence[int],
) -> list[Ids]:
    """For each conversation the beginning of its completion in student ids: empty, or what the teacher wrote.

    `conversations` are as the teacher reads them; `inside` says which completions start in a think block.
    A prefix that the teacher finished ends with the student's stop id. Prefixes are cut to `max_new_tokens` student
    ids.
    """
    seeds = seeds_of_rows(seed, len(conversations))
    draws = [random.Random(one) for one in seeds]
    lengths = [draw.randint(1, max_new_tokens) if draw.random() < alpha else 0 for draw in draws]
    chosen = [i for i, length in enumerate(lengths) if length]
    prefixes: list[Ids] = [np.zeros(0, dtype=np.int64) for _ in conversations]
    if not chosen:
        return prefixes
    prompts = [renderer_t.prompt_ids(conversations[i], thinking=inside[i]) for i in chosen]
    completions = sampler(teacher, prompts, max_new_tokens=max(lengths), seed=[seeds[i] for i in chosen])
    for i, prompt, written in zip(chosen, prompts, completions, strict=True):
        read = renderer_t.from_sampled(conversations[i], written[: lengths[i]], prompt_ids=prompt)
        text = read.segment_bytes[0].decode("utf-8")  # up to the first control token, which the student may not have
        ids = renderer_s.encoder.encode([text])[0].ids if text else np.zeros(0, dtype=np.int64)
        ending = [renderer_s.stop_id] if read.stopped[0] else []
        prefixes[i] = np.append(ids, ending).astype(np.int64)[:max_new_tokens]
    return prefixes


def continue_prefixes(
    sampler: TransformersSampler,
    student: PreTrainedModel,
    prompts: Sequence[Ids],
    prefixes: Sequence[Ids],
    *,
    max_new_tokens: int,
    seed: int | Sequence[int],
) -> list[Ids]:
    """The student's completions, `prefixes` included, of at most `max_new_tokens` ids."""
    finished = [len(p) >= max_new_tokens or (len(p) > 0 and p[-1] in sampler.stop_ids) for p in prefixes]
    open_ones = [np.concatenate([a, b]) for a, b, end in zip(prompts, prefixes, finished, strict=True) if not end]
    seeds = [s for s, end in zip(seeds_of_rows(seed, len(prompts)), finished, strict=True) if not end]
    written = iter(sampler(student, open_ones, max_new_tokens=max_new_tokens, seed=seeds))
    completions = []
    for prefix, end in zip(prefixes, finished, strict=True):
        completions.append(prefix if end else np.concatenate([prefix, next(written)])[:max_new_tokens])
    return completions


def mixture_weight(
    logp_s: Tensor, logp_t: Tensor, alignment: Alignment[Tensor], alpha: float, max_new_tokens: int | None = None
) -> Tensor:
    """Importance weight of each student token, [N_s], in (0, 1 / (1 - alpha)]; all tokens of a chunk share it.

    Args:
        logp_s: the student's log-probs of the written tokens, nats, [N_s].
        logp_t: the teacher's, [N_t].
        max_new_tokens: longest teacher prefix; None where every token was drawn from the mixture (`a_k = alpha`).
    """
    chunks, chunk_s, chunk_t = alignment.num_chunks, alignment.chunk_s, alignment.chunk_t
    if not chunks:
        return torch.ones_like(logp_s)

    share = torch.full((chunks,), alpha, device=logp_s.device)
    if max_new_tokens is not None:
        before = alignment.count_s.cumsum(0) - alignment.count_s
        first = torch.searchsorted(alignment.chunk_segment, alignment.chunk_segment)  # of each chunk's segment
        start = before[first]
        share = share * (1 - (before - start) / max_new_tokens).clamp(0, 1)
    ratio = (
        chunk_sums(logp_t, chunk_t, chunks) - chunk_sums(logp_s, chunk_s, chunks)
    ).exp()  # may overflow to inf: the weight is then 0
    weight = 1 / (share * ratio + (1 - share))
    return torch.where(chunk_s >= 0, weight[chunk_s.clamp(min=0)], 1.0).to(logp_s.dtype)
