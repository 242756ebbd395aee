"""Where a model's passes in training are random: dropout and jitter, and off with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

# Of Phi-MoE's routers: a threshold, which evaluation needs as well. In training an expert is drawn of those above it.
_DRAWS = "router_jitter_noise"


def dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str, float]]:
    """Module, attribute and value of every dropout or jitter above zero: layers, those of adapters too, and the numbers
    that modules of `transformers` hand to functions (`attention_dropout`, `resid_pdrop`, `layerdrop`) or multiply the
    input of their routers with (`jitter_noise`, `input_jitter_noise`, `moe_jitter_eps`)."""
    for module in model.modules():
        layer = isinstance(module, nn.modules.dropout._DropoutNd)
        for name in ["p"] if layer else [name for name in vars(module) if "drop" in name or "jitter" in name]:
            value = getattr(module, name)
            off = name == _DRAWS and _as_in_evaluation in module._forward_pre_hooks.values()
            if isinstance(value, float) and value > 0 and not off:
                yield module, name, value


def turn_off_dropout(model: nn.Module) -> None:
    """Training and evaluation mode compute the same afterwards. The model's configuration stays as it is."""
    for module, name, _ in list(dropouts(model)):
        if name == _DRAWS:
            module.register_forward_pre_hook(_as_in_evaluation)
        else:
            setattr(module, name, 0.0)


def _as_in_evaluation(module: nn.Module, inputs: Any) -> None:
    module.training = False
