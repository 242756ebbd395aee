"""Log-probabilities of written tokens, from blocks of logits that never all exist at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diglot.heads.head import Head
from diglot.heads.rows import blocks


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

    The logits of a block are formed again in the backward pass, so at most `chunk_rows` rows of them exist at a time.

    Args:
        hidden: `[N, H]`, the hidden state that predicts each token.
        targets: int64 `[N]`, the tokens; ignored where `stop`.
        stop: bool `[N]`: the event is "the turn ends", whose mass is that of all `stop_ids` together.
        temperature: divides the logits.
    """
    ids = torch.as_tensor(stop_ids, dtype=torch.int64, device=hidden.device)
    targets = targets.to(hidden.device).masked_fill(stop.to(hidden.device), 0)
    block_logps = partial(_logps, head=head, stop_ids=ids, temperature=temperature)
    recomputed = torch.is_grad_enabled() and (hidden.requires_grad or bool(head.parameters))
    found = []
    for block in blocks(len(hidden), chunk_rows):
        rows = (hidden[block], targets[block], stop[block].to(hidden.device))
        found.append(checkpoint(block_logps, *rows, use_reentrant=False) if recomputed else block_logps(*rows))
    return torch.cat(found)


def _logps(
    hidden: Tensor, targets: Tensor, stop: Tensor, *, head: Head, stop_ids: Tensor, temperature: float
) -> Tensor:
    logits = head(hidden)
    if temperature != 1.0:
        logits = logits / temperature
    written = logits.gather(-1, targets[:, None]).squeeze(-1)
    return torch.where(stop, logits[:, stop_ids].logsumexp(-1), written) - logits.logsumexp(-1)
