"""Divergences between rows of log-probabilities, safe where a mass is zero."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q) over the last dimension, in nats. Entries need not sum to one.

    Where p is zero the term is zero, whatever q is; where only q is zero the result is infinite.
    """
    divergence: Tensor = _KL.apply(*_alike(logp, logq))
    return divergence


def forward_kl(p: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q) over the last dimension, in nats, of constant masses `p [R, K]` and log-probs `logq [R, K]`.

    As `kl`, with two passes over the entries instead of a dozen: its derivative by `logq` is `-p`.
    """
    logp = p.clamp(min=torch.finfo(p.dtype).tiny).log_()
    divergence: Tensor = logp.mul_(p).sum(-1) - _Expectation.apply(p, logq)
    return divergence


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
    divergence: Tensor = _Mixture.apply(*_alike(logp_s, logp_t), beta)
    return divergence


# Autograd would keep ten matrices of the size of the logits and read each of them again. Written out, a divergence and
# its derivatives are a few passes over them, most of them in place, and what is kept is the derivative itself.


class _KL(torch.autograd.Function):
    """`sum(p (log p - log q))`. By log p: `p (log p - log q) + p`; by log q: `-p`."""

    @staticmethod
    def forward(ctx: Any, logp: Tensor, logq: Tensor) -> Tensor:
        # The difference is replaced, not the product: no -inf - -inf ever gets into a derivative.
        terms = (logp - logq).masked_fill_(logp == -math.inf, 0.0)
        p = logp.exp()
        divergence = terms.mul_(p).sum(-1)
        by_p, by_q = ctx.needs_input_grad
        ctx.save_for_backward(terms.add_(p) if by_p else None, p if by_q else None)
        return divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_sum: Tensor) -> tuple[Tensor | None, ...]:
        of_p, p = ctx.saved_tensors
        return None if of_p is None else of_p * of_sum[..., None], None if p is None else p * -of_sum[..., None]


class _Mixture(torch.autograd.Function):
    """`beta KL(t || m) + (1 - beta) KL(s || m)`, `m = beta t + (1 - beta) s`, for beta between 0 and 1.

    With `w = log m - log s` and `d = log t - log s` the terms are `beta t (d - w)` and `-(1 - beta) s w`, and each is
    also the derivative by its own logarithm, whatever the entries sum to: what the others say of `m` cancels.
    `w = log1p(beta expm1(d))` is exact where both are nearly the same, which is where a difference of two rounded
    logarithms is noise.
    """

    @staticmethod
    def forward(ctx: Any, logp_s: Tensor, logp_t: Tensor, beta: float) -> Tensor:
        far = -math.log(torch.finfo(logp_s.dtype).eps)  # there the smaller one is rounded away beside the larger
        d = (logp_t - logp_s).nan_to_num_(0.0).clamp_(-far, far)  # an entry that both lack is -inf - -inf
        w = d.expm1().mul_(beta).log1p_()
        of_t = d.sub_(w).mul_(logp_t.exp())
        of_s = w.mul_(logp_s.exp())
        by_s, by_t, _ = ctx.needs_input_grad
        ctx.beta = beta
        ctx.save_for_backward(of_s if by_s else None, of_t if by_t else None)
        return beta * of_t.sum(-1) - (1 - beta) * of_s.sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_sum: Tensor) -> tuple[Tensor | None, ...]:
        of_s, of_t = ctx.saved_tensors
        factor = of_sum[..., None]
        by_s = None if of_s is None else of_s * (factor * (ctx.beta - 1))
        return by_s, None if of_t is None else of_t * (factor * ctx.beta), None


def _alike(*values: Tensor) -> tuple[Tensor, ...]:
    """In one number type and shape, so that a derivative has those of its argument."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in values))
    tensors: tuple[Tensor, ...] = torch.broadcast_tensors(*(x.to(dtype) for x in values))
    return tensors
