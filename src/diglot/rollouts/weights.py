"""The student's weights as a checkpoint that another process can read: what an engine with its own copy is given."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

_PREFIX = "step-"


class WeightsFolder:
    """Holds one checkpoint at a time, each in a new folder: none is ever read half-written.

    Args:
        place: made on first use. Folders in it that an older run left behind are removed.
    """

    def __init__(self, place: Path) -> None:
        self.place = place.resolve()
        self._count = 0

    @contextmanager
    def holding(self, model: PreTrainedModel, whole_head: bool = False) -> Iterator[Path]:
        """A folder with the weights of `model`, those of adapters merged in; gone afterwards.

        `whole_head`: an output head that is the embedding is written a second time, under its own name.
        """
        self.clear()
        self._count += 1
        folder = self.place / f"{_PREFIX}{self._count}"
        try:
            save_plain(model, folder, whole_head)
            yield folder
        finally:
            self.clear()

    def clear(self) -> None:
        """Remove what was written."""
        for old in self.place.glob(f"{_PREFIX}*"):
            shutil.rmtree(old, ignore_errors=True)


def save_plain(model: PreTrainedModel, folder: Path, whole_head: bool = False) -> None:
    """Write a checkpoint that is read without PEFT. The model is afterwards what it was before.

    A model that is spread over processes must be `gathered`; then one of them can write it alone.
    """
    if not hasattr(model, "peft_config"):
        return _save(model, _state(model), folder, whole_head)
    peft: Any = model
    originals = {name: p.detach().clone() for name, p in peft.named_parameters() if ".base_layer." in name}
    peft.merge_adapter()
    try:
        base = peft.get_base_model()
        _save(base, _plain_names(_state(base)), folder, whole_head)
    finally:
        peft.unmerge_adapter()
        for name, p in peft.named_parameters():  # subtracting what was added leaves rounding behind
            if name in originals:
                p.data.copy_(originals[name])


def _save(model: PreTrainedModel, state: dict[str, Any], folder: Path, whole_head: bool) -> None:
    if not whole_head:
        model.save_pretrained(folder, state_dict=state)
        return
    name = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    config: Any = model.config
    tied, config.tie_word_embeddings = config.tie_word_embeddings, False
    try:
        weight = state[f"{name}.weight"]
        model.save_pretrained(folder, state_dict={**state, f"{name}.weight": weight.detach().clone()})
    finally:
        config.tie_word_embeddings = tied


def _state(model: PreTrainedModel) -> dict[str, Any]:
    """Its tensors by name. Of a model that FSDP2 spreads these are the whole ones while it is `gathered`: its own
    `state_dict` would free them and hold one process's share."""
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        return model.state_dict()
    parameters = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    if apart := [name for name, p in parameters.items() if isinstance(p, DTensor)]:
        raise RuntimeError(f"{apart[0]} is spread over the processes: hand out weights of a gathered model")
    persistent = (
        (f"{prefix}.{name}" if prefix else name, buffer)
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    )
    return {**parameters, **dict(persistent)}


def _plain_names(state: dict[str, Any]) -> dict[str, Any]:
    """The base model's own names, without the adapters' tensors."""
    plain = {}
    for name, tensor in state.items():
        if "lora_" in name or ".original_module." in name:
            continue
        parts = name.replace(".base_layer.", ".").split(".modules_to_save.")
        plain[parts[0] if len(parts) == 1 else ".".join([parts[0], *parts[1].split(".")[1:]])] = tensor
    return plain
