"""`diglot` as its own command starts it, on CPU processes that may use FSDP and DeepSpeed as GPU processes do.

accelerate turns both on for processes with an accelerator only. Neither asks for one itself: told that these processes
may, accelerate wraps, swaps, clips, saves and loads as it does elsewhere.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from diglot.cli.main import main

torch.set_num_threads(1)
_init = AcceleratorState.__init__


def _with_fsdp(self: AcceleratorState, *args: object, fsdp_plugin: object = None, **keywords: object) -> None:
    _init(self, *args, fsdp_plugin=fsdp_plugin, **keywords)
    plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")  # every later call finds the one of the first
    if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
        print(f"spread by FSDP{plugin.fsdp_version}", flush=True)


AcceleratorState.__init__ = _with_fsdp  # type: ignore[method-assign]

_prepare_backend = PartialState._prepare_backend


def _with_deepspeed(self: PartialState, *args: object, **keywords: object) -> tuple[str | None, DistributedType]:
    """Processes that were not told to be CPUs are ones, where accelerate finds nothing else."""
    backend, kind = _prepare_backend(self, *args, **keywords)
    ours = backend is None and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    return ("gloo", DistributedType.MULTI_CPU) if ours else (backend, kind)


PartialState._prepare_backend = _with_deepspeed  # type: ignore[method-assign]


def run_all(plan: Path) -> int:
    """The command lines of a JSON file one after the other in the same processes, up to the first that fails."""
    for arguments in json.loads(plan.read_text(encoding="utf-8")):
        print("==", *arguments, flush=True)
        if code := main(arguments):
            return code
        if "--deepspeed" in arguments:  # or the run would be one of plain processes
            assert AcceleratorState().distributed_type == DistributedType.DEEPSPEED
    return 0


if __name__ == "__main__":
    sys.exit(run_all(Path(sys.argv[2])) if sys.argv[1] == "--plan" else main())
