"""Divergences between rows of log-probabilities, safe where a mass is zero."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q) over the last dimension, in nats. Entries need not sum to one.

    Where p is zero the term is zero, whatever q is; where only q is zero the result is infinite.
    """
    # `where` on the difference, not on the product: no -inf - -inf is ever formed that a gradient could turn to NaN.
    difference = torch.where(logp == -math.inf, 0.0, logp - logq)
    return (logp.exp() * difference).sum(-1)


def forward_kl(p: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q) over the last dimension, in nats, of constant masses `p [R, K]` and log-probs `logq [R, K]`.

    As `kl`, with two passes over the entries instead of a dozen: its derivative by `logq` is `-p`.
    """
    logp = p.clamp(min=torch.finfo(p.dtype).tiny).log_()
    return logp.mul_(p).sum(-1) - _Expectation.apply(p, logq)


class _Expectation(torch.autograd.Function):
    """`sum(p * values)` of constant `p`, where nothing is added that has mass zero."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(p)
        return values.masked_fill(p == 0, 0.0).mul_(p).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_sum: Tensor) -> tuple[None, Tensor]:
        (p,) = ctx.saved_tensors
        return None, of_sum[:, None] * p


def generalized_jsd(logp_s: Tensor, logp_t: Tensor, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence of two rows of log-probabilities over the last dimension, in nats.

    `beta=0` is exactly the forward KL(teacher || student), `beta=1` exactly the reverse KL(student || teacher); in
    between `beta * KL(t || m) + (1 - beta) * KL(s || m)` with `m = beta * t + (1 - beta) * s`, as TRL computes it.
    (Agarwal et al., GKD, arXiv 2306.13649, eq. 4. The endpoints are special-cased: there the formula itself is zero,
    the KLs are its limits after division by `beta (1 - beta)`.) At 0.5 symmetric, at most log 2.
    """
    if beta == 0:
        return kl(logp_t, logp_s)
    if beta == 1:
        return kl(logp_s, logp_t)
    # Columns that are dead on both sides give nothing, but logaddexp(-inf, -inf) has a NaN gradient.
    dead = (logp_s == -math.inf) & (logp_t == -math.inf)
    log_m = torch.logaddexp(logp_t.masked_fill(dead, 0.0) + math.log(beta), logp_s + math.log1p(-beta))
    return beta * kl(logp_t, log_m) + (1 - beta) * kl(logp_s, log_m)
