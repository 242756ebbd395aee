"""`diglot` as its own command starts it, on CPU processes that may use FSDP as GPU processes do.

accelerate turns FSDP on for processes with an accelerator only. Nothing of FSDP2 itself asks for one: told that these
processes may, accelerate wraps, swaps, clips, saves and loads as it does elsewhere.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
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


def run_all(plan: Path) -> int:
    """The command lines of a JSON file one after the other in the same processes, up to the first that fails."""
    for arguments in json.loads(plan.read_text(encoding="utf-8")):
        print("==", *arguments, flush=True)
        if code := main(arguments):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(run_all(Path(sys.argv[2])) if sys.argv[1] == "--plan" else main())
