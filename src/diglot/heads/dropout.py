"""Where a model drops out, and off with it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str, float]]:
    """Module, attribute and probability of every dropout above zero: layers, those of adapters too, and the numbers
    that attention and MLPs of `transformers` hand to functions (`attention_dropout`, `resid_pdrop`, `layerdrop`)."""
    for module in model.modules():
        layer = isinstance(module, nn.modules.dropout._DropoutNd)
        for name in ["p"] if layer else [name for name in vars(module) if "drop" in name]:
            value = getattr(module, name)
            if isinstance(value, float) and value > 0:
                yield module, name, value


def turn_off_dropout(model: nn.Module) -> None:
    """Training and evaluation mode compute the same afterwards. The model's configuration stays as it is."""
    for module, name, _ in list(dropouts(model)):
        setattr(module, name, 0.0)
