"""The last two pieces of a model that is elsewhere: its final norm and its output head, read from its weights alone.

Of a model of 400 billion parameters these are about a thousandth: a server's hidden states become logits here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import cached_file

from diglot.errors import TeacherError
from diglot.heads import Head
from diglot.heads.hidden import decoder_of

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class NoWeights(TeacherError):
    """A model's norm and head cannot be had from what lies at a place."""


@dataclass(frozen=True)
class Readout:
    """From the residual stream behind a model's last layer to logits."""

    norm: nn.Module
    head: Head
    width: int  # H

    def hidden(self, states: Tensor) -> Tensor:
        """What the head reads, `[N, H]`, from states before the final norm, in their own number type; no gradient."""
        with torch.no_grad():
            hidden: Tensor = self.norm(states.to(self.head.device or states.device))
            return hidden

    def to(self, device: torch.device | str) -> None:
        """Move both."""
        self.norm.to(device)
        self.head.module.to(device)


def load_readout(place: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Readout:
    """Final norm and output head of the model at `place`, a model id or folder with safetensors files.

    Raises:
        NoWeights: no weights lie there, or the two pieces are not where models of `transformers` have them.
    """
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(place, **options)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        decoder, output = decoder_of(model), model.get_output_embeddings()
    except (OSError, ValueError, KeyError) as error:
        raise NoWeights(f"No model is described at {place!r}: {str(error)[:200]}") from error
    norms = [module for module in decoder.children() if "norm" in type(module).__name__.lower()]
    if not norms or output is None:
        raise NoWeights(f"A {type(model).__name__} has no final norm or no output embeddings that could be found.")
    tied = config.get_text_config().tie_word_embeddings
    names = {id(module): name for name, module in model.named_modules()}
    prefix = f"{model.base_model_prefix}."
    _fill(norms[-1], names[id(norms[-1])], names[id(norms[-1])], place, prefix, revision)
    source = names[id(model.get_input_embeddings())] if tied else names[id(output)]
    _fill(output, names[id(output)], source, place, prefix, revision)
    head = Head.of(model)
    head.frozen = True
    return Readout(norms[-1], head, config.get_text_config().hidden_size)


def _fill(module: nn.Module, name: str, source: str, place: str, prefix: str, revision: str | None) -> None:
    """Put the checkpoint's tensors into a module that has none yet, in the checkpoint's number type."""
    tensors = {}
    for key, parameter in module.named_parameters():
        full = f"{source}.{key}"
        tensor = _tensor([full, full.removeprefix(prefix)], place, revision)
        if tensor.shape != parameter.shape:
            raise NoWeights(
                f"{full} at {place!r} is {tuple(tensor.shape)}, and {name} takes {tuple(parameter.shape)}: its weights "
                "are stored in another form (quantised?). Name the model's unquantised weights."
            )
        tensors[key] = tensor
    module.load_state_dict(tensors, strict=False, assign=True)
    module.requires_grad_(False).eval()


def _tensor(names: Sequence[str], place: str, revision: str | None) -> Tensor:
    """One tensor of a checkpoint, the first of these names that it has; its other tensors are not read."""
    index = _file(place, _INDEX, revision)
    shard: dict[str, str] = {}
    if index is not None:
        with open(index, encoding="utf-8") as file:
            shard = json.load(file)["weight_map"]
    for name in names:
        path = _file(place, shard.get(name, _ONE), revision) if not shard or name in shard else None
        if path is None:
            continue
        try:
            with safe_open(path, framework="pt") as tensors:
                if name in tensors.keys():  # noqa: SIM118  (not a dictionary)
                    tensor: Tensor = tensors.get_tensor(name)
                    return tensor
        except SafetensorError as error:
            raise NoWeights(f"{path} cannot be read: {error}") from error
    raise NoWeights(f"There is no {names[0]} in safetensors files at {place!r}.")


def _file(place: str, name: str, revision: str | None) -> str | None:
    missing: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    try:
        return cached_file(place, name, revision=revision, **missing)
    except OSError:
        return None
