"""Models whose parameters are spread over processes (FSDP2): whole ones for a while, by the wrapper's own means."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard


def sharded_parts(model: nn.Module) -> list[FSDPModule]:
    """The modules of `model` that FSDP2 gathers and frees on their own, the outermost first."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def gathered(*models: nn.Module) -> Iterator[None]:
    """All parameters whole on every process inside, without a further exchange; sharded again afterwards.

    For passes whose number differs from process to process: sampling, evaluation. Every process must enter and leave.
    Does nothing for a model that is not sharded.
    """
    of_models = [sharded_parts(model) for model in models]
    parts = [part for of_model in of_models for part in of_model]
    for of_model in of_models:
        if of_model:  # as a first pass would: a process that writes nothing has none
            of_model[0]._get_fsdp_state()._lazy_init()
    groups = [group for part in parts for group in _groups(part)]
    before = [group.post_forward_mesh_info for group in groups]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for group, mesh_info in zip(groups, before, strict=True):
            group.post_forward_mesh_info = mesh_info
            # The order of passes decides what the next backward pass fetches ahead: it must be that of all processes.
            group._post_forward_indices.clear()
            group.comm_ctx.post_forward_order.clear()
        for part in parts:
            part.reshard()


@contextmanager
def even_passes(*models: nn.Module) -> Iterator[None]:
    """Passes inside may differ in number and order from process to process, though the models stay sharded.

    Before each pass the processes agree whose it is: those that have none, or another one's, take part with one token.
    Every process must enter and leave. Does nothing for models that are not sharded.
    """
    sharded = [model for model in models if isinstance(model, FSDPModule)]
    joining = False

    def take_turns(mine: int) -> None:
        """Join passes of others until it is the turn of model `mine`; -1: until there are none."""
        nonlocal joining
        while not joining and (turn := _largest(mine, sharded[0])) != mine:
            joining = True
            model = sharded[turn]
            one = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
            with torch.no_grad():
                model(input_ids=one, attention_mask=one + 1, use_cache=False)
            joining = False

    hooks = [
        model.register_forward_pre_hook(lambda *_, k=k: take_turns(k), prepend=True)  # before FSDP gathers
        for k, model in enumerate(sharded)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if sharded:
        take_turns(-1)


def _largest(value: int, model: nn.Module) -> int:
    """Of all processes."""
    shared = torch.tensor(value, device=next(model.parameters()).device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def keep_after_forward(model: nn.Module, module: nn.Module) -> None:
    """Let the part of `model` that holds `module` (the head) stay gathered from its forward to its backward pass.

    The head is read between the two. Its gradient then reaches the gathered parameter, and FSDP2 reduces it with the
    others of its part.
    """
    wanted = {id(p) for p in module.parameters()}
    for part in sharded_parts(model):
        held = {id(p.sharded_param) for group in _groups(part) for p in group.fsdp_params}
        held |= {id(p._unsharded_param) for g in _groups(part) for p in g.fsdp_params if hasattr(p, "_unsharded_param")}
        if held & wanted:
            part.set_reshard_after_forward(False, recurse=False)


def shard_frozen(model: nn.Module) -> None:
    """Spread a frozen model over all processes: its layers one by one, what is left as a whole.

    What is left (embeddings, the head) stays gathered after the first pass, since the head is read outside of passes.
    """
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for layer in [layer for stack in stacks for layer in stack]:
        if any(True for _ in layer.parameters()) and not isinstance(layer, FSDPModule):
            fully_shard(layer, reshard_after_forward=True)
    fully_shard(model, reshard_after_forward=False)


def _groups(part: Any) -> list[Any]:
    """The groups of parameters that a part manages; newer versions of torch allow several."""
    state = part._get_fsdp_state()
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [group for group in groups if group is not None]
