"""From the host to a device without the host waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(x: Tensor, device: torch.device | str) -> Tensor:
    """`x` on `device`; from pinned memory where that is CUDA, so that the host goes on while it is copied."""
    target = torch.device(device)
    if x.device.type != "cpu" or target.type == "cpu":
        return x.to(target)
    return (x.pin_memory() if target.type == "cuda" else x).to(target, non_blocking=True)
