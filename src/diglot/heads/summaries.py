"""Short summaries of rows of logits that never all exist at once, with gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diglot.heads.head import Head
from diglot.heads.pullback import HeadGradient
from diglot.heads.rows import Joining, at_temperature, blocks, parts, put, within

Summary = Callable[[Tensor, slice], Tensor]


def summaries(summary: Summary, hidden: Tensor, head: Head, chunk_rows: int, temperature: float = 1.0) -> Tensor:
    """`summary(logits [r, V], rows)` of blocks of rows, joined along the first dimension.

    `hidden` is `[N, H]`; `rows` is the slice of the `N` rows that a block holds. A summary may have any number of
    entries per row. The logits of a block are formed again in the backward pass, so at most `chunk_rows` rows of them
    exist at a time; the gradient cannot be differentiated. `temperature` divides the logits.
    """

    def of_raw(raw: Tensor, block: slice) -> Tensor:
        return summary(at_temperature(head.finished(raw), temperature), block)

    joined: Tensor = _Summaries.apply(of_raw, head, chunk_rows, hidden, *head.parameters)
    return joined


class _Summaries(torch.autograd.Function):
    """Blocks of summaries; backward goes through them one by one."""

    @staticmethod
    def forward(ctx: Any, of_raw: Summary, head: Head, chunk_rows: int, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.of_raw, ctx.head, ctx.chunk_rows = of_raw, head, chunk_rows
        ctx.save_for_backward(hidden)
        device = hidden.device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        joined, ctx.lengths = Joining(len(hidden)), []
        for block in blocks(len(hidden), chunk_rows):
            raw = head.raw(hidden[block])
            for part in parts(len(raw), chunk_rows):
                of_part = of_raw(raw[part], within(block, part))
                joined.add(of_part)
                ctx.lengths.append(len(of_part))
            del raw, of_part
        return joined.whole()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_joined: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        gradient, of_hidden = HeadGradient(ctx.head), torch.zeros_like(hidden)
        of_parts = iter(of_joined.split(ctx.lengths))
        for block in blocks(len(hidden), ctx.chunk_rows):
            with torch.autocast(*ctx.autocast):  # as in the forward pass
                raw, way_back = gradient.raw(hidden[block].detach())
                any_gradient = False
                for part in parts(len(raw), ctx.chunk_rows):
                    leaf, of_part = raw[part].requires_grad_(), next(of_parts)
                    with torch.enable_grad():
                        summary = ctx.of_raw(leaf, within(block, part))
                    of_leaf: Tensor | None = None
                    if summary.requires_grad:
                        (of_leaf,) = torch.autograd.grad(summary, leaf, of_part, allow_unused=True)
                    any_gradient |= put(of_leaf, raw[part])
            of_rows = way_back(raw) if any_gradient else None
            if of_rows is not None:
                of_hidden[block] = of_rows
        return None, None, None, of_hidden, *gradient.gradients()


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
