"""The last hidden states of a causal language model, without the logits of all positions."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from diglot.errors import ConfigError


def unwrap(model: nn.Module) -> Any:
    """The `transformers` model inside wrappers of compilation, data parallelism and PEFT."""
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):  # torch.compile
            inner = inner._orig_mod
        elif isinstance(getattr(inner, "module", None), nn.Module):  # DistributedDataParallel and its kin
            inner = inner.module
        elif hasattr(inner, "get_base_model"):  # PEFT
            inner = inner.get_base_model()
        else:
            return inner


def cache_argument(model: nn.Module) -> str:
    """What this model's `forward` and its output call the kept keys and values.

    It is `past_key_values` up to transformers 5.23, and `cache` since.
    """
    known = inspect.signature(type(unwrap(model)).forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def rotates_alike(model: nn.Module, length: int) -> bool:
    """Is a position rotated alike in all texts of up to `length` tokens?

    Some models (longrope, dynamic NTK) rotate all positions in another way once a text is longer than those that they
    were first trained on: keys kept of a pass that was shorter, or longer, fit no other one.
    """
    config = unwrap(model).config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(of_layers for of_layers in rope.values() if isinstance(of_layers, dict))]
    lengths = [
        kind.get("original_max_position_embeddings") or config.max_position_embeddings
        for kind in kinds
        if "dynamic" in kind.get("rope_type", "") or kind.get("rope_type") == "longrope"
    ]
    return length <= min(lengths, default=length)


def last_hidden(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
    """The hidden states that the output head reads, `[B, T, H]`, after the final norm, with gradient if enabled.

    `input_ids` and `attention_mask` are `[B, T]`. The model runs as a whole, through its wrappers, so that their hooks
    see a forward pass, but no logits are formed where the model can do without. `kwargs` go to the model.
    """
    return run_with_hidden(model, input_ids, attention_mask, all_logits=False, **kwargs)[0]


def run_with_hidden(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, *, all_logits: bool, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Hidden states `[B, T, H]` and logits of one forward pass, `[B, T, V]` or of none of the positions, `[B, 0, V]`.

    Models that cannot choose positions form all logits, those of other libraries perhaps those of the last position.
    """
    inner = unwrap(model)
    # A hook on the decoder sees its output alone; `output_hidden_states` would keep every layer's alive as well. But
    # a compiled model need not honour a hook that is set after its compilation.
    hooked = not is_compiled(model, inner)
    if not all_logits and "logits_to_keep" in inspect.signature(type(inner).forward).parameters:
        # One position is not nothing: of a few tokens behind a text the product with a large head is most of the pass.
        own = type(inner).__module__.startswith("transformers.")  # others may take nothing but a number
        # A slice, and no tensor: of a model on several devices the head's input may be on another one.
        kwargs["logits_to_keep"] = slice(0, 0) if own else 1
    seen: list[Any] = []
    decoder = decoder_of(inner)
    handle = decoder.register_forward_hook(lambda module, args, output: seen.append(output)) if hooked else None
    try:
        output = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            output_hidden_states=not hooked,
            return_dict=True,
            **{"use_cache": False, **kwargs},
        )
    finally:
        if handle is not None:
            handle.remove()
    return (_hidden_of(seen[-1]) if hooked else output.hidden_states[-1]), output.logits


def decoder_of(model: Any) -> nn.Module:
    """What makes the hidden states that the output head reads. `ConfigError` if it is not apart from the head."""
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else None
    if getattr(decoder, "lm_head", None) is not None:
        decoder = getattr(decoder, "model", model)  # Llama 4 gives a whole language model: itself, or that of pictures
    if decoder is None or decoder is model:
        raise ConfigError(
            f"{type(model).__name__} has no decoder apart from its output head (get_decoder gives "
            f"{type(decoder).__name__}). Use a causal language model of transformers."
        )
    inner: nn.Module = decoder
    return inner


def _hidden_of(output: Any) -> Tensor:
    hidden: Tensor = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
    return hidden


def is_compiled(model: nn.Module, inner: nn.Module) -> bool:
    """Is `model`, or the `inner` one of it, compiled? Hooks set afterwards need not be honoured then."""
    return hasattr(model, "_orig_mod") or getattr(inner, "_compiled_call_impl", None) is not None
