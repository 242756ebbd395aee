"""Trainable maps of objectives: in the optimizer and beside the checkpoint, never inside the student."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diglot.errors import ConfigError
from diglot.heads import Head
from diglot.objectives import ProjectedObjective
from diglot.trainers.terms import Term

FILE = "projectors.safetensors"


def make_projectors(terms: Sequence[Term], student: Head, teacher: Head | None) -> dict[str, nn.Parameter]:
    """Prepare the terms that have projectors; all of their parameters by name."""
    found: dict[str, nn.Parameter] = {}
    for term in terms:
        if isinstance(term.objective, ProjectedObjective):
            assert teacher is not None  # the rung was checked
            term.objective.prepare(_weight(student), _weight(teacher))
            found |= {f"{term.name}.{name}": p for name, p in term.objective.projectors.items()}
    return found


def add_to_optimizer(optimizer: torch.optim.Optimizer, projectors: dict[str, nn.Parameter]) -> None:
    """A group of its own, with the learning rate of the first one and no weight decay."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    new = [p for p in projectors.values() if id(p) not in held]
    if new:
        optimizer.add_param_group({"params": new, "weight_decay": 0.0, "lr": optimizer.param_groups[0]["lr"]})


def save_projectors(folder: Path, projectors: dict[str, nn.Parameter]) -> None:
    """Write them into `folder`."""
    save_file({name: p.detach().cpu().contiguous() for name, p in projectors.items()}, folder / FILE)


def load_projectors(folder: Path, projectors: dict[str, nn.Parameter]) -> None:
    """Read what `save_projectors` wrote. `ConfigError` if the checkpoint has others."""
    path = folder / FILE
    saved = load_file(path) if path.exists() else {}
    if {n: t.shape for n, t in saved.items()} != {n: p.shape for n, p in projectors.items()}:
        raise ConfigError(
            f"{path} holds the projectors {_shapes(saved)}, this run {_shapes(projectors)}. Resume with the objective "
            "and the models of the checkpoint."
        )
    with torch.no_grad():
        for name, parameter in projectors.items():
            parameter.copy_(saved[name])


def _weight(head: Head) -> Tensor:
    weight = getattr(head.module, "weight", None)
    if not isinstance(weight, Tensor):
        raise ConfigError(
            f"The head of {head.name} is a {type(head.module).__name__} without a weight of its own, so no projector "
            "can start from it. Use another objective than 'dskd'."
        )
    return weight


def _shapes(tensors: dict) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in sorted(tensors.items())}
