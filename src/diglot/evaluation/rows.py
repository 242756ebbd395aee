"""What one model says in the rows of a text: log-probs of what was written, of stop, and the likeliest tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diglot.batches import AlignedBatch, PackedSide
from diglot.heads import Head, logits_by_parts


@dataclass(frozen=True)
class RowFacts:
    """One side of a batch, on the CPU. The stop event is the whole stop set."""

    logp: Tensor  # [N] log-prob of each written token, nats
    stop: Tensor  # [N] probability of the stop set in the row that predicts the token
    top_ids: Tensor  # int64 [N, k] the likeliest tokens of the row
    top_p: Tensor  # [N, k] their probabilities


@torch.no_grad()
def row_facts(
    hidden: Tensor, side: PackedSide, head: Head, stop_ids: Tensor, chunk_rows: int, top: int = 0
) -> RowFacts:
    """Facts of the rows `hidden` `[N, H]` that predict the scored tokens of `side`, in one pass over the head."""
    blocks: list[list[Tensor]] = []
    for rows, logits in logits_by_parts(hidden, head, chunk_rows):
        total, stop = logits.logsumexp(-1), logits[:, stop_ids.to(logits.device)].logsumexp(-1)
        written = logits.gather(-1, side.targets[rows].to(logits.device)[:, None])[:, 0]
        logp = torch.where(side.stop[rows].to(logits.device), stop, written) - total
        best, ids = logits.topk(top, dim=-1)
        blocks.append([logp, (stop - total).exp(), ids, (best - total[:, None]).exp()])
    if not blocks:
        empty = torch.zeros(0)
        return RowFacts(empty, empty, torch.zeros(0, top, dtype=torch.int64), torch.zeros(0, top))
    return RowFacts(*(torch.cat(parts).cpu() for parts in zip(*blocks, strict=True)))


def compare(batch: AlignedBatch, student: RowFacts, teacher: RowFacts) -> dict[str, np.ndarray]:
    """The columns of an `OnPolicyReport`, `[M]` each: sums over the exact chunks of each sample of `batch`."""
    alignment, num = batch.alignment.to("cpu"), len(batch.pairs)
    exact_s, exact_t = map(alignment.in_exact_chunk, (alignment.chunk_s, alignment.chunk_t))
    sample_s, sample_t = sample_of(batch.student), sample_of(batch.teacher)
    surprisal = sample_sums(-student.logp * exact_s, sample_s, num)
    both = student.stop[alignment.pair_s], teacher.stop[alignment.pair_t]
    at_pairs = sample_s[alignment.pair_s]
    return {
        "gap": -surprisal - sample_sums(teacher.logp * exact_t, sample_t, num),
        "surprisal": surprisal,
        "num_bytes": np.array([sum(map(len, p.student.segment_bytes)) for p in batch.pairs], dtype=np.float64),
        "stop_common": sample_sums(torch.minimum(*both), at_pairs, num),
        "stop_either": sample_sums(torch.maximum(*both), at_pairs, num),
        "tokens": sample_sums(torch.ones_like(student.logp), sample_s, num),
        "covered": sample_sums(exact_s.to(student.logp), sample_s, num),
        "stopped": np.array([p.student.ended for p in batch.pairs], dtype=np.float64),
    }


def sample_of(side: PackedSide) -> Tensor:
    """Which sample of the batch each scored token belongs to, `[N]`."""
    return (side.rows // side.input_ids.shape[1]).cpu()


def sample_sums(values: Tensor, sample: Tensor, num: int) -> np.ndarray:
    """Sum of `values` `[N]` for each sample, float64 `[num]`."""
    totals = torch.zeros(num, dtype=torch.float64)
    return totals.index_add(0, sample.cpu(), values.cpu().double()).numpy()
