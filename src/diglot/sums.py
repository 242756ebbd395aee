"""Running sums whose additions have one order, also on devices on which torch has none such."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_BLOCK = 64  # columns whose running sums are one product with a triangle of ones


def running_sums(x: Tensor, *, overwrite: bool = False) -> Tensor:
    """`x.cumsum(-1)`, also where torch is to use nothing but deterministic algorithms (`full_determinism`).

    On CUDA it has no such one for floating-point numbers and raises. There the sums are products with triangles of
    ones: in blocks, then over the blocks' totals, in one order. Where torch's own is allowed it is the faster one.

    Args:
        x: floating point, `[..., n]`; float64 where differences of the sums are taken.
        overwrite: nobody needs `x` any more.
    """
    if x.device.type == "cpu" or not torch.are_deterministic_algorithms_enabled():
        return x.cumsum_(-1) if overwrite else x.cumsum(-1)
    return running_sums_by_blocks(x)


def running_sums_by_blocks(x: Tensor) -> Tensor:
    """The same by products with triangles of ones, on any device."""
    count = x.shape[-1]
    blocks = -(-count // _BLOCK)
    ones = x.new_ones(_BLOCK, _BLOCK).triu()
    if blocks <= 1:
        return x @ ones[:count, :count]
    inside = nn.functional.pad(x, (0, blocks * _BLOCK - count)).unflatten(-1, (blocks, _BLOCK)) @ ones
    before = nn.functional.pad(running_sums_by_blocks(inside[..., :-1, -1]), (1, 0))
    sums: Tensor = (inside + before[..., None]).flatten(-2)[..., :count]
    return sums
