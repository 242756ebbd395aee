"""From the gradient of a block of logits to that of hidden states and head, with one sum per parameter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diglot.heads.head import Head

WayBack = Callable[[Tensor], Tensor | None]


class HeadGradient:
    """The gradient of a head's trainable parameters, summed over blocks of rows.

    Sums of many blocks are kept in float32 even where the parameter is not.
    """

    def __init__(self, head: Head) -> None:
        self.head, self.parameters = head, head.parameters
        self.sums = [torch.zeros_like(p, dtype=_sum_dtype(p), requires_grad=False) for p in self.parameters]
        # Fresh leaves: hooks on the model's own parameters see one whole gradient later, not that of every block.
        self.leaves = [p.detach().requires_grad_() for p in self.parameters]

    def raw(self, hidden: Tensor, ids: Tensor | None = None) -> tuple[Tensor, WayBack]:
        """Raw logits of `hidden [R, H]`, without gradient, and what to do with theirs.

        The logits may be overwritten: with their gradient, for one. The way back adds to the sums and returns the
        gradient of `hidden`. For a linear head it is written out, so that no gradient of the size of the weight is made
        per block, and it is of 32 bits or more; through adapters it is autograd's.
        """
        head = self.head
        if head.is_linear:
            with torch.no_grad():
                raw = head.raw(hidden, ids=ids)
            return raw, lambda of_raw: head.pull_back(of_raw, hidden, self.sums, ids)
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            raw = head.raw_with(self.leaves, leaf)
        return raw.detach(), lambda of_raw: self._by_autograd(raw, of_raw, leaf)

    def _by_autograd(self, raw: Tensor, of_raw: Tensor, leaf: Tensor) -> Tensor | None:
        of_hidden, *of_leaves = torch.autograd.grad(raw, [leaf, *self.leaves], of_raw, allow_unused=True)
        for so_far, gradient in zip(self.sums, of_leaves, strict=True):
            if gradient is not None:
                so_far.add_(gradient)
        return of_hidden

    def gradients(self) -> list[Tensor]:
        """One gradient per parameter, in its own number type."""
        return [total.to(p.dtype) for total, p in zip(self.sums, self.parameters, strict=True)]


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
