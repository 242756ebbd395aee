"""What the processes of one run must agree on: places and seeds of rows, names of metrics, gradients of projectors."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object

from diglot.errors import ConfigError
from diglot.heads import shard_frozen
from diglot.options import DistillationConfig
from diglot.teachers import Teacher
from diglot.teachers.adapter import has_own_model


def row_places(sizes: Sequence[int], batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """The place of each row of this rank's micro-batches in the window of all ranks.

    Micro-batch `i` of `rank` is number `i * world_size + rank` of the data, as accelerate deals them out; so one
    process with the same rows in a window gives them the same places.
    """
    return [[(i * world_size + rank) * batch_size + row for row in range(size)] for i, size in enumerate(sizes)]


def row_seed(base: int, place: int, generation: int = 0) -> int:
    """The seed of one completion of one row."""
    return random.Random(f"{base}/{place}/{generation}").getrandbits(63)


def reduce_device(device: torch.device) -> torch.device:
    """Where sums in float64 can be reduced."""
    return device if device.type != "mps" else torch.device("cpu")


def sum_over_ranks(accelerator: Accelerator, counts: Mapping[str, float]) -> dict[str, float]:
    """Sum each count over all ranks, in one exchange."""
    if accelerator.num_processes == 1:
        return {name: float(count) for name, count in counts.items()}
    names = sorted(counts)
    device = reduce_device(accelerator.device)
    local = torch.tensor([float(counts[n]) for n in names], dtype=torch.float64, device=device)
    return dict(zip(names, accelerator.reduce(local, "sum").tolist(), strict=True))


def with_all_names(sums: Mapping[str, float]) -> dict[str, float]:
    """`sums` and, as zero, every name that another rank has: a reduction needs the same names everywhere."""
    return {**dict.fromkeys(sorted(set(gather_object(list(sums)))), 0.0), **sums}


def check_wrapping(accelerator: Accelerator) -> None:
    """Raise `ConfigError` for ways of sharding a student whose head could not be read outside of its forward pass."""
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ConfigError(
            "FSDP version 1 flattens the parameters, and the student's head cannot be read outside of its forward "
            "pass. Set fsdp_version: 2."
        )
    if kind == DistributedType.DEEPSPEED and (stage := int(accelerator.deepspeed_plugin.zero_stage)) == 3:
        raise ConfigError(
            f"DeepSpeed ZeRO stage {stage} leaves the student's head empty outside of its forward pass. Use FSDP "
            "(fsdp_version: 2), which shards as much, or ZeRO stage 2."
        )


def check_devices(args: DistillationConfig) -> None:
    """Raise `ConfigError` for devices on which a run could not work, or would not do what it says."""
    if args.device.type == "mps":
        raise ConfigError(
            "The device is mps, which has no float64, and sampling and several objectives sum in it. Train on CUDA, or "
            "on the CPU with use_cpu: true."
        )
    if args.fp16 and args.device.type == "cpu":
        raise ConfigError(
            "fp16=True does nothing on the CPU: Accelerate computes in float32 there. Drop it, or set bf16."
        )
    if args.n_gpu > 1:
        raise ConfigError(
            f"{args.n_gpu} GPUs are visible to one process, which nn.DataParallel would give the wrong rows. Start one "
            f"process for each (torchrun --nproc_per_node {args.n_gpu} -m diglot train ...), or show it one: "
            "CUDA_VISIBLE_DEVICES=0."
        )


def place_frozen(held: Teacher, accelerator: Accelerator) -> None:
    """A teacher on its device; spread over the processes where the student is."""
    sharded = accelerator.distributed_type == DistributedType.FSDP and accelerator.num_processes > 1
    if sharded and has_own_model(held):
        shard_frozen(held.model)
    else:
        held.to(accelerator.device)
