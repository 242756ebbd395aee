"""Digests of what decides a teacher's answers: its weights, its tokenizer and template, its texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from diglot.rendering import Renderer


def tensor_bytes(x: Tensor) -> memoryview:
    """The raw bytes of a tensor of any type."""
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 of a model's class, configuration, parameters and buffers; where they were loaded from has no part."""
    digest = hashlib.sha256(type(model).__name__.encode())
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name}/{x.dtype}/{tuple(x.shape)}/".encode())
        digest.update(tensor_bytes(x))
    return digest.hexdigest()


def template_digest(renderer: Renderer, template_kwargs: Mapping[str, Any] | None) -> str:
    """SHA-256 of the chat template, of what it is given, and of how messages are put into it."""
    about = [getattr(renderer.tokenizer, "chat_template", None), dict(template_kwargs or {})]
    about += [renderer.guard.manner, renderer.template.fold_system]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
