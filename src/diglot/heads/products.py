"""Products of 16-bit matrices with float32 results.

Logits rounded to bfloat16 are off by up to a 256th of themselves. Where student and teacher nearly agree, that is more
than what they differ by, and their gradient is mostly noise (19% of it at 0.003 nats a row). The units that multiply
16-bit numbers add up in float32 anyway, so writing that down costs bandwidth only.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SHORT = (torch.bfloat16, torch.float16)
_COLUMNS = 16384  # of a vocabulary that are copied into another number type at a time
_CACHED = 2048  # of a vocabulary: a CPU writes their results into its cache, 10 to 25% faster than all at once


def product_dtype(weight: Tensor) -> torch.dtype:
    """The number type in which products with `weight` are computed: autocast's where it is on, else the weight's."""
    kind = weight.device.type
    if weight.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return weight.dtype
    return torch.get_autocast_dtype(kind)


def times(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`a @ b` of two matrices, multiplied in `dtype`; float32 if that has 16 bits, else `dtype`.

    Only CUDA multiplies 16-bit numbers into float32. Elsewhere the factors are float32.
    """
    with torch.autocast(a.device.type, enabled=False):
        if dtype not in SHORT:
            return a.to(dtype) @ b.to(dtype)
        if a.device.type == "cuda":
            return torch.mm(a.to(dtype), b.to(dtype), out_dtype=torch.float32)
        return a.float() @ b.float()


def rows_times(hidden: Tensor, weight: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """`hidden [R, H] @ weight.T [H, V]`, as `times`; written to `out`, of at least `R` rows, if given."""
    as_it_is = _copied_as_it_is(weight, dtype)
    if as_it_is and hidden.device.type != "cpu":
        return times(hidden, weight.T, dtype)
    shape = len(hidden), len(weight)
    product = torch.empty(shape, dtype=result_dtype(dtype), device=hidden.device) if out is None else out[: len(hidden)]
    for part in _parts(len(weight), _CACHED if as_it_is else _COLUMNS):
        product[:, part] = times(hidden, weight[part].T, dtype)
    return product


def rows_back(of_raw: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`of_raw [R, V] @ weight [V, H]`, as `times`."""
    if _copied_as_it_is(weight, dtype):
        return times(of_raw, weight, dtype)
    product = torch.zeros(len(of_raw), weight.shape[1], dtype=result_dtype(dtype), device=of_raw.device)
    for part in _parts(len(weight)):
        product += times(of_raw[:, part], weight[part], dtype)
    return product


def add_outer(total: Tensor, of_raw: Tensor, hidden: Tensor, dtype: torch.dtype) -> None:
    """`total [V, H] += of_raw.T [V, R] @ hidden [R, H]`, as `times`, without a second `[V, H]`."""
    if total.dtype == of_raw.dtype and (dtype not in SHORT or of_raw.device.type != "cuda"):
        with torch.autocast(total.device.type, enabled=False):
            total.addmm_(of_raw.T, hidden.to(total.dtype))
        return
    for part in _parts(len(total)):
        total[part] += times(of_raw[:, part].T, hidden, dtype)


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """The number type of results of products in `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def _copied_as_it_is(weight: Tensor, dtype: torch.dtype) -> bool:
    """Is the weight multiplied without a copy in another number type?"""
    wanted = dtype if weight.device.type == "cuda" else result_dtype(dtype)
    return weight.dtype == wanted


def _parts(rows: int, size: int = _COLUMNS) -> Iterator[slice]:
    return (slice(at, min(at + size, rows)) for at in range(0, rows, size))
