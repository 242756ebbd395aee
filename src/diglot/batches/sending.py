"""From the host to a device without the host waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Record = TypeVar("Record")
_ALIGNED = 16  # bytes: where each tensor of a common buffer begins, so that it can be read as any number type


def sent(x: Tensor, device: torch.device | str) -> Tensor:
    """`x` on `device`; from pinned memory where that is CUDA, so that the host goes on while it is copied."""
    target = torch.device(device)
    if x.device.type != "cpu" or target.type == "cpu":
        return x.to(target)
    return (x.pin_memory() if target.type == "cuda" else x).to(target, non_blocking=True)


def sent_together(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Each of them on `device`, in one copy for all that are on the host: views of one buffer of bytes there."""
    if torch.device(device).type == "cpu" or any(x.device.type != "cpu" for x in tensors):
        return [sent(x, device) for x in tensors]
    sizes = [x.numel() * x.element_size() for x in tensors]
    begins = [0]
    for size in sizes:
        begins.append(begins[-1] + -(-size // _ALIGNED) * _ALIGNED)
    host = torch.empty(begins[-1], dtype=torch.uint8)
    places = [slice(begin, begin + size) for begin, size in zip(begins, sizes, strict=False)]
    for place, x in zip(places, tensors, strict=True):
        host[place].view(x.dtype).copy_(x.flatten())
    there = sent(host, device)
    return [there[place].view(x.dtype).view(x.shape) for place, x in zip(places, tensors, strict=True)]


def sent_record(record: Record, device: torch.device | str) -> Record:
    """A dataclass with its tensors on `device`, in one copy; what else it holds stays as it is."""
    moved: Record = sent_records([record], device)[0]
    return moved


def sent_records(records: Sequence[Any], device: torch.device | str) -> list[Any]:
    """Several dataclasses, in one copy for all of them. Gradients do not pass."""
    names = [[f.name for f in fields(one) if isinstance(getattr(one, f.name), Tensor)] for one in records]
    own = [getattr(one, name) for one, of_one in zip(records, names, strict=True) for name in of_one]
    there = iter(sent_together(own, device))
    return [replace(one, **{name: next(there) for name in of_one}) for one, of_one in zip(records, names, strict=True)]
