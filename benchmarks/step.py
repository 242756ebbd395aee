"""What a training step costs beyond its two models.

One step without generation (read, align, both forward passes, the loss, backward) against the bare floor on the same
texts: student forward and backward, teacher forward, with the logits that such models make, and nothing else. Both
alternate in one process.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from measure import alternate, check_same, digest, term_for

from diglot import GKDTrainer
from diglot.comparisons import Batch

OBJECTIVES: dict[str, dict[str, Any]] = {
    "covering": {},
    "strict": {"beta": 1.0},
    "span": {},
    "bpm": {},
    "byte": {},
    "shared_prefix": {},
}


def floor(trainer: GKDTrainer, batch: Batch) -> None:
    """Both models on the step's own inputs, whole logits, the cheapest loss there is."""
    side = batch.student
    logits = trainer.model(input_ids=side.input_ids, attention_mask=side.attention_mask, use_cache=False).logits
    logits.sum().backward()
    with torch.no_grad():
        other = batch.views[0].read.teacher
        trainer.comparisons[0].teacher.model(
            input_ids=other.input_ids, attention_mask=other.attention_mask, use_cache=False
        )
    trainer.model.zero_grad(set_to_none=True)


def step(trainer: GKDTrainer) -> tuple[Batch, float]:
    """One step; the batch, and the seconds of reading and aligning in it."""
    start = time.perf_counter()
    data: Any = trainer.train_dataset
    samples = trainer.data_collator([data[i] for i in range(len(data))])
    (inputs,), _ = trainer.get_batch_samples(iter([samples]), 1, trainer.args.device)
    aligned = time.perf_counter() - start
    trainer.compute_loss(trainer.model, inputs).backward()
    trainer.model.zero_grad(set_to_none=True)
    return inputs["batch"], aligned


def compare(trainer: GKDTrainer, objectives: Sequence[str], repeats: int) -> dict[str, Any]:
    """Each objective as the trainer's only one, against the floor."""
    found: dict[str, Any] = {}
    for name in objectives:
        term = term_for(trainer, name, **OBJECTIVES.get(name, {}))
        trainer.comparisons = [replace(trainer.comparisons[0], terms=(term,))]
        batch, _ = step(trainer)  # warms up as well
        floor(trainer, batch)
        shares: list[float] = []
        inputs = _inputs(batch)

        def of_step(name: str = name, inputs: str = inputs, shares: list[float] = shares) -> float:
            start = time.perf_counter()
            own, aligned = step(trainer)
            seconds = time.perf_counter() - start
            shares.append(aligned / seconds)
            print(f"  {name}: {seconds:.2f} s", file=sys.stderr, flush=True)
            check_same("the texts of step and floor", floor=inputs, step=_inputs(own))
            return seconds

        timing = alternate(
            {"floor": lambda batch=batch: floor(trainer, batch), "step": of_step}, repeats, warm_up=False
        )
        low, high = timing.spread("step", "floor")
        found[name] = {
            "floor_seconds": timing.median("floor"),
            "step_seconds": timing.median("step"),
            "reading_share": sorted(shares)[len(shares) // 2],
            "ratio": timing.ratio("step", "floor"),
            "ratio_low": low,
            "ratio_high": high,
            "scored": len(batch.student.rows),
        }
    return found


def _inputs(batch: Batch) -> str:
    own, other = batch.student, batch.views[0].read.teacher
    return digest(own.input_ids, other.input_ids, own.rows, other.rows)
