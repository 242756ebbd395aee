"""Short summaries of rows of logits that never all exist at once, with gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diglot.heads.head import Head
from diglot.heads.rows import blocks

Summary = Callable[[Tensor, slice], Tensor]


def summaries(summary: Summary, hidden: Tensor, head: Head, chunk_rows: int, temperature: float = 1.0) -> Tensor:
    """`summary(logits [r, V], rows)` of blocks of rows, joined along the first dimension.

    `hidden` is `[N, H]`; `rows` is the slice of the `N` rows that a block holds. A summary may have any number of
    entries per row. The logits of a block are formed again in the backward pass, so at most `chunk_rows` rows of them
    exist at a time. `temperature` divides the logits.
    """

    def of_block(rows: Tensor, block: slice) -> Tensor:
        logits = head(rows)
        return summary(logits if temperature == 1.0 else logits / temperature, block)

    recomputed = torch.is_grad_enabled() and (hidden.requires_grad or bool(head.parameters))
    found = []
    for block in blocks(len(hidden), chunk_rows):
        rows = hidden[block]
        found.append(checkpoint(of_block, rows, block, use_reentrant=False) if recomputed else of_block(rows, block))
    return torch.cat(found)


def token_logps(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    stop: Tensor,
    stop_ids: Tensor | Sequence[int],
    chunk_rows: int,
    temperature: float = 1.0,
) -> Tensor:
    """Log-probability in nats of each token under the row that predicts it, `[N]`, float32 (float64 if given).

    Args:
        hidden: `[N, H]`, the hidden state that predicts each token.
        targets: int64 `[N]`, the tokens; ignored where `stop`.
        stop: bool `[N]`: the event is "the turn ends", whose mass is that of all `stop_ids` together.
        temperature: divides the logits.
    """
    ids = torch.as_tensor(stop_ids, dtype=torch.int64, device=hidden.device)
    stop = stop.to(hidden.device)
    targets = targets.to(hidden.device).masked_fill(stop, 0)

    def logps(logits: Tensor, rows: slice) -> Tensor:
        written = logits.gather(-1, targets[rows, None]).squeeze(-1)
        return torch.where(stop[rows], logits[:, ids].logsumexp(-1), written) - logits.logsumexp(-1)

    return summaries(logps, hidden, head, chunk_rows, temperature)
