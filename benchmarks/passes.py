"""How many bytes of rows of logits the loss stage reads and writes, beside its matrix products.

A device that trains is limited there by memory, not by arithmetic, and bytes can be counted without one: every
operation of torch is caught, and what it reads and writes of tensors as wide as logits is added up. A pass is one row
of logits of both vocabularies in float32, read or written, per student token. A loss that is computed in one kernel
would need two or three: both rows read, one gradient written.

    python benchmarks/passes.py [--rows 2] [--only NAME ...] [--lines 8]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from measure import demo_trainer, machine, prepared_batch, term_for
from objectives import loss_stage, noisy_pair
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diglot import GKDTrainer
from diglot.objectives import OBJECTIVES

SOURCES = str(Path("src") / "diglot") + "/"
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "_scaled_dot_product_flash_attention_for_cpu")
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view")
PICKED = ("gather", "index", "index_select", "embedding")
"""Read no more of a wide tensor than they return."""
FILLED = ("fill", "zero", "new_zeros", "zeros", "zeros_like", "new_full", "full", "full_like")
PUT = ("index_fill", "index_put", "_index_put_impl", "scatter", "scatter_add", "index_copy", "index_add")


class Traffic(TorchDispatchMode):
    """Bytes of wide tensors that are read and written, by operation and line of Diglot."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width  # of a row of logits, about; what is much narrower belongs to a model
        self.bytes, self.kernels = Counter[tuple[str, str]](), 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = op(*args, **(kwargs or {}))
        name = op._schema.name.split("::")[1]
        if op.is_view or name.rstrip("_") in PRODUCTS or name in FREE:
            return outputs
        tensors = ({id(x): x for x in tree_leaves(some) if isinstance(x, Tensor)} for some in ((args, kwargs), outputs))
        if size := self._size(name, *(list(some.values()) for some in tensors)):
            self.bytes[name.rstrip("_"), _line()] += size
            self.kernels += 1
        return outputs

    def _size(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> int:
        plain, in_place = name.rstrip("_"), name.endswith("_")
        if plain in PICKED:
            return 2 * sum(map(self._bytes, outputs))
        if plain in FILLED:
            return sum(map(self._bytes, outputs))
        if plain in PUT:
            own, *others = inputs
            whole = 0 if in_place else 2 * self._bytes(own)  # in place touches no more than what is named
            return whole + 2 * sum(map(self._bytes, others))
        return sum(map(self._bytes, inputs)) + sum(map(self._bytes, outputs))

    def _bytes(self, x: Tensor) -> int:
        if not x.dim() or x.shape[-1] < self.width:
            return 0
        entries = 1
        for size, stride in zip(x.shape, x.stride(), strict=True):
            entries *= size if stride else 1  # what is expanded is read once
        return entries * x.element_size()


def _line() -> str:
    frame: Any = sys._getframe(2)
    while frame is not None:
        if SOURCES in frame.f_code.co_filename:
            return f"{frame.f_code.co_filename.split(SOURCES)[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "the way back of autograd"


def passes(trainer: GKDTrainer, name: str) -> tuple[float, int, list[tuple[str, float]]]:
    """Passes per student token, kernels on wide tensors, and the lines that read and write most."""
    batch = prepared_batch(trainer)
    with torch.no_grad():
        hidden = trainer.hidden_at_rows(trainer.student, batch.student)
    states, (view,) = batch.views[0].answers.hidden, batch.views  # pulled before anything is counted
    pair, term = view.comparison.pair, term_for(trainer, name)
    assert len(states)
    loss_stage(trainer, term, hidden, batch)  # what is made once is made
    with Traffic(min(pair.size_s, pair.size_t) // 2) as traffic:
        loss_stage(trainer, term, hidden, batch)
    one = 4 * (pair.size_s + pair.size_t) * len(hidden)
    lines = [(f"{op} {line}", size / one) for (op, line), size in traffic.bytes.most_common()]
    return sum(size for _, size in lines), traffic.kernels, lines


def main() -> None:
    """Print the passes of each objective, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=sorted(OBJECTIVES), choices=sorted(OBJECTIVES))
    parser.add_argument("--lines", type=int, default=0, help="of each objective, those that read and write most")
    options = parser.parse_args()
    print(machine())
    rows = {}
    pair = demo_trainer("strict", options.rows) if set(options.only) - {"jsd"} else None
    for name in options.only:
        total, kernels, lines = passes(noisy_pair(options.rows) if name == "jsd" or pair is None else pair, name)
        rows[name] = {"passes": total, "kernels": kernels}
        print(f"{name:14s} {total:6.1f} passes {kernels:6d} kernels", flush=True)
        for line, size in lines[: options.lines]:
            print(f"    {size:6.2f} {line}")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
