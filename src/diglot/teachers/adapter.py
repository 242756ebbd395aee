"""The student's base as its teacher: the same weights in memory, read with the adapter switched off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers import PreTrainedModel

from diglot.errors import ConfigError
from diglot.heads import Head, evaluating
from diglot.rendering import Renderer
from diglot.teachers.loading import window_of
from diglot.teachers.local import LocalTeacher
from diglot.teachers.teacher import Teacher

OWN_BASE = "self"
"""The teacher's name that means: the student without its adapter."""


class AdapterOff(LocalTeacher):
    """What the student said before it had an adapter. No second copy of the weights; nothing is frozen here.

    Args:
        model: the student, with its adapter (PEFT) or before it gets one; then `follow` is due.
        renderer: what the teacher reads; the student's tokenizer, a template and prompt of its own.
        max_length: longest input in tokens.
    """

    def __init__(self, model: PreTrainedModel, renderer: Renderer, max_length: int | None = None) -> None:
        self.model, self.renderer = model, renderer
        self.max_length = max_length or window_of(model)
        head = Head.of(model)
        base = Head(_without_adapter(head.module), scale=head.scale, softcap=head.softcap, name=head.name, frozen=True)
        self.head = base
        if hasattr(model, "disable_adapter"):
            with self.running():
                base.verify(model)
        else:
            base.verify(model)

    def follow(self, model: Any) -> None:
        """From now on `model` is the student. `ConfigError` if it has no adapter to switch off."""
        if not hasattr(model, "disable_adapter"):
            raise ConfigError(
                f"teacher_model_name_or_path={OWN_BASE!r} is the student with its adapter off, and this student, a "
                f"{type(model).__name__}, has none: teacher and student would be one model. Train an adapter "
                "(use_peft, peft_config), or name the teacher's weights: they are then loaded once more."
            )
        self.model = model

    def to(self, device: torch.device | str) -> None:
        """Nothing: who trains the student moves it."""

    @contextmanager
    def running(self) -> Iterator[PreTrainedModel]:
        """The base, in evaluation mode; adapter and modes are as before afterwards."""
        model: Any = self.model
        with evaluating(model), model.disable_adapter():
            yield model


def has_own_model(teacher: Teacher) -> TypeGuard[LocalTeacher]:
    """Is the teacher a model of its own in this process, beside the student's?"""
    return isinstance(teacher, LocalTeacher) and not isinstance(teacher, AdapterOff)


def _without_adapter(module: nn.Module) -> nn.Module:
    """The module inside an adapter's layer."""
    while (inner := getattr(module, "base_layer", None) or getattr(module, "original_module", None)) is not None:
        module = inner
    return module
