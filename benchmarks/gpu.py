"""The loss stage on a card: how near it comes to the card's own rate of matrix products, and what memory it takes.

    make bench-gpu
    python benchmarks/gpu.py --device cpu --rows 64 --hidden 32 --vocabularies 600 700   # the same code, no card

From hidden states of both models to the gradient of the student's and of its head's weight, with random heads: 8,192
rows of 4,096 numbers, vocabularies of 128,256 and 151,936 ids, bfloat16 inputs. The card's rate is that of one product
of these sizes, measured before. `share` is the rate that the stage's own products reach over its whole time: three of
the student's head (logits, and two gradients) and one of the teacher's. Memory is the peak beyond inputs and gradients.
The goals are printed beside what was measured; a goal that is missed is no error.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import machine, table
from torch import Tensor, nn

from diglot.heads import Head, default_chunk_rows, reduce_rows
from diglot.objectives import Values
from diglot.objectives.cell_masses import CellColumns, CellMasses
from diglot.objectives.divergences import generalized_jsd
from diglot.objectives.jsd import full_jsd

OUT = Path("runs/bench/gpu.json")
CELLS = 64
"""Of a row, as the default for unequal vocabularies tells them apart."""
SHARE, EXTRA_GB = 0.55, 2.0
"""Goals: the least share of the card's rate, and the most memory."""


class Stage:
    """Hidden states and heads of both sides, on a device."""

    def __init__(self, device: str, rows: int, hidden: int, sizes: tuple[int, int], seed: int = 0) -> None:
        self.device, self.rows, self.width, self.sizes = torch.device(device), rows, hidden, sizes
        draw = torch.Generator(self.device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, device=self.device, dtype=torch.bfloat16)

        self.weights = [nn.Linear(hidden, size, bias=False, device=self.device, dtype=torch.bfloat16) for size in sizes]
        for module in self.weights:
            module.weight.data = normal(*module.weight.shape) * 2 * hidden**-0.5
        self.weights[1].requires_grad_(False)
        self.heads = [Head(module) for module in self.weights]
        self.hidden_s, self.hidden_t = normal(rows, hidden).requires_grad_(), normal(rows, hidden)
        chosen = np.random.default_rng(seed)
        cell = np.where(
            chosen.random(sizes[0]) < 0.06, chosen.integers(0, sizes[0] // 4, sizes[0]), np.arange(sizes[0])
        )
        cell[: sizes[0] // 4] = np.arange(sizes[0] // 4)
        self.columns = CellColumns.of(cell).to(self.device)
        own = np.stack([chosen.choice(sizes[0] // 4, CELLS, replace=False) for _ in range(rows)])
        self.row_inputs = {"column": torch.from_numpy(own).to(self.device)}
        self.sets = [torch.tensor([sizes[0] - i], device=self.device) for i in (1, 2)]

    def jsd(self, logits_s: Tensor, logits_t: Tensor, **_: Tensor) -> Values:
        """Whole rows of equal vocabularies, or of the ids that both have."""
        return Values(full_jsd(logits_s, logits_t))

    def cells(self, logits_s: Tensor, logits_t: Tensor, *, column: Tensor) -> Values:
        """Cells of the student's rows beside the likeliest ids of the teacher's: the two passes of `covering`."""
        target = logits_t.float().log_softmax(-1).topk(column.shape[1], dim=-1).values
        token = column[:, 0]
        masses, *_ = CellMasses.apply(logits_s.float(), self.columns, column, token, *self.sets)
        return Values(generalized_jsd(masses.clamp(min=1e-8).log(), target, 0.5))

    def run(self, compare: Callable[..., Values]) -> None:
        """Values and gradients."""
        every = torch.arange(self.rows, device=self.device)
        weight = torch.full((self.rows,), 1 / self.rows, device=self.device, dtype=torch.float64)
        chunk = default_chunk_rows(*self.sizes, self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            total, _ = reduce_rows(
                compare, self.hidden_s, self.heads[0], self.hidden_t, self.heads[1], every, every, weight, chunk,
                given=self.row_inputs,
            )  # fmt: skip
        total.backward()
        self.hidden_s.grad = self.weights[0].weight.grad = None

    @property
    def operations(self) -> float:
        """Multiplications and additions of the stage's products."""
        return 2.0 * self.rows * self.width * (3 * self.sizes[0] + self.sizes[1])


def seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median of some runs, after one to warm up."""
    times = []
    for turn in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        if turn:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured(stage: Stage, repeats: int) -> dict[str, Any]:
    """The card's rate, and each comparison's share of it, seconds and gigabytes."""
    device, (a, b) = stage.device, (stage.hidden_t, stage.weights[0].weight.detach())
    rate = 2.0 * stage.rows * stage.width * stage.sizes[0] / seconds(lambda: a @ b.T, device, repeats)
    measures: dict[str, Any] = {"operations_per_second": rate}
    for name, compare in (("jsd", stage.jsd), ("cells", stage.cells)):
        taken = seconds(functools.partial(stage.run, compare), device, repeats)
        extra = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            stage.run(compare)
            gradients = stage.hidden_s.nbytes + stage.weights[0].weight.nbytes
            extra = (torch.cuda.max_memory_allocated(device) - before - gradients) / 1e9
        measures[name] = {"seconds": taken, "share": stage.operations / taken / rate, "extra_gb": extra}
    return measures


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write `runs/bench/gpu.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabularies", type=int, nargs=2, default=(128_256, 151_936))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("There is no CUDA device here. --device cpu runs the same code.", file=sys.stderr)
        return 1
    card = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    measures = measured(
        Stage(options.device, options.rows, options.hidden, tuple(options.vocabularies)), options.repeats
    )
    about = {"card": card, "machine": machine(), "command": sys.argv if arguments is None else arguments}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(
        json.dumps({**about, "rows": options.rows, "hidden": options.hidden, **measures}, indent=1) + "\n"
    )
    print(f"{card}, {measures['operations_per_second'] / 1e12:.1f} Top/s in a product of these sizes")
    lines = [(n, v["seconds"], v["share"], "-" if v["extra_gb"] is None else v["extra_gb"])
             for n, v in measures.items() if isinstance(v, dict)]  # fmt: skip
    print(table(("comparison", "seconds", f"share (goal {SHARE})", f"GB (goal {EXTRA_GB:g})"), lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
