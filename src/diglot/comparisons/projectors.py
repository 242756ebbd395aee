"""Trainable maps of objectives: in the optimizer and beside the checkpoint, never inside the student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diglot.comparisons.terms import Term
from diglot.errors import ConfigError
from diglot.heads import Head
from diglot.objectives import Objective

FILE = "projectors.safetensors"


def make_projectors(terms: Sequence[Term], student: Head, teacher: Head | None) -> dict[str, nn.Parameter]:
    """The trainable parameters of all terms by name, made from the output embeddings of both models."""
    if teacher is None or not any(_has_own(term) for term in terms):
        return {}
    weights = _weight(student), _weight(teacher)
    return {f"{t.name}.{name}": p for t in terms for name, p in t.objective.parameters(*weights).items()}


def _has_own(term: Term) -> bool:
    return type(term.objective).parameters is not Objective.parameters


def add_to_optimizer(optimizer: torch.optim.Optimizer, projectors: dict[str, nn.Parameter]) -> None:
    """A group of its own, with the learning rate of the first one and no weight decay."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    new = [p for p in projectors.values() if id(p) not in held]
    if new:
        optimizer.add_param_group({"params": new, "weight_decay": 0.0, "lr": optimizer.param_groups[0]["lr"]})
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            optimizer.register_step_pre_hook(lambda *_: average_gradients(new))


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Mean of each gradient over all processes, in one exchange of one size, whoever has which gradients.

    A parameter keeps no gradient where no process has one, so that the optimizer leaves it alone as on one process.
    """
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    there = torch.tensor([float(p.grad is not None) for p in parameters], device=grads[0].device)
    whole = torch.cat([there, *(g.float().flatten() for g in grads)])
    dist.all_reduce(whole)
    means = (whole[len(there) :] / dist.get_world_size()).split([g.numel() for g in grads])  # type: ignore[no-untyped-call]
    for parameter, grad, count in zip(parameters, means, whole[: len(there)].tolist(), strict=True):
        parameter.grad = grad.view_as(parameter).to(parameter.dtype) if count else None


def same_everywhere(projectors: dict[str, nn.Parameter], sharded: bool) -> None:
    """Give every process the projectors of the first. `ConfigError` where the optimizer could not hold them."""
    if projectors and sharded:
        raise ConfigError(
            "Objective 'dskd' trains projectors, and the optimizer of a sharded student holds parameters of the "
            "student alone. Run it without FSDP (plain data parallelism), or choose an objective without projectors."
        )
    if dist.is_available() and dist.is_initialized():
        for projector in projectors.values():
            dist.broadcast(projector.data, src=0)


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


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in sorted(tensors.items())}
