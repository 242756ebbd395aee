"""What a training step costs beyond its two models.

One step without generation (read, align, both forward passes, the loss, backward) against the bare floor on the same
texts: student forward and backward, teacher forward, with the logits that such models make, and nothing else. All
alternate in one process. Every round has texts of its own: what an objective remembers of a text must not make it
cheap. What is watched now and then, on fixed texts and on completions, belongs to no step and is off.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from measure import BenchError, Timing, check_same, digest, term_for

from diglot import GKDTrainer
from diglot.comparisons import Batch

FLOOR = "floor"
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


def read(trainer: GKDTrainer, texts: Sequence[int]) -> dict[str, Any]:
    """One micro-batch of these texts of the data, read and aligned."""
    data: Any = trainer.train_dataset
    samples = trainer.data_collator([data[i] for i in texts])
    (inputs,), _ = trainer.get_batch_samples(iter([samples]), 1, trainer.args.device)
    return inputs


def step(trainer: GKDTrainer, texts: Sequence[int]) -> tuple[Batch, float]:
    """One step; the batch, and the seconds of reading and aligning in it."""
    start = time.perf_counter()
    inputs = read(trainer, texts)
    aligned = time.perf_counter() - start
    trainer.compute_loss(trainer.model, inputs).backward()
    trainer.model.zero_grad(set_to_none=True)
    return inputs["batch"], aligned


def compare(trainer: GKDTrainer, objectives: Sequence[str], repeats: int) -> dict[str, Any]:
    """Each objective as the trainer's only one, against the floor, on equal shares of the data in every round.

    Ratios are of wall-clock time, `cpu_ratio` of the processor's time in this process: on a busy machine without an
    accelerator it is the steadier one.
    """
    if trainer.args.log_rollouts:
        raise BenchError("The trainer watches its completions, which is no part of a step: give log_rollouts=0.")
    rows = len(trainer.train_dataset) // (repeats + 1)  # type: ignore[arg-type]
    bare = trainer.comparisons[0]
    terms = {name: term_for(trainer, name, **OBJECTIVES.get(name, {})) for name in objectives}
    seconds: dict[str, list[float]] = {name: [] for name in (FLOOR, *terms)}
    processor: dict[str, list[float]] = {name: [] for name in (FLOOR, *terms)}
    shares: dict[str, list[float]] = {name: [] for name in terms}
    scored = 0
    for turn in range(repeats + 1):  # the first one warms up
        texts = range(turn * rows, (turn + 1) * rows)
        batch: Batch = read(trainer, texts)["batch"]
        scored += len(batch.student.rows) if turn else 0
        for name in list(seconds)[:: -1 if turn % 2 else 1]:
            if name != FLOOR:
                trainer.comparisons = [replace(bare, terms=(terms[name],))]
            start = time.perf_counter(), time.process_time()
            own, aligned = (batch, 0.0) if name == FLOOR else step(trainer, texts)
            if name == FLOOR:
                floor(trainer, batch)
            wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
            check_same("the texts of step and floor", floor=_inputs(batch), step=_inputs(own))
            print(f"  {name}: {wall:.2f} s, {cpu:.2f} of the processor", file=sys.stderr, flush=True)
            if turn:
                seconds[name].append(wall)
                processor[name].append(cpu)
                shares.get(name, []).append(aligned / wall)
    timing, busy = Timing(seconds), Timing(processor)
    return {name: _row(timing, busy, name, statistics.median(shares[name]), scored / repeats) for name in terms}


def _row(timing: Timing, busy: Timing, name: str, share: float, scored: float) -> dict[str, float]:
    low, high = timing.spread(name, FLOOR)
    cpu_low, cpu_high = busy.spread(name, FLOOR)
    return {
        "floor_seconds": timing.median(FLOOR),
        "step_seconds": timing.median(name),
        "reading_share": share,
        "ratio": timing.ratio(name, FLOOR),
        "ratio_low": low,
        "ratio_high": high,
        "cpu_ratio": busy.ratio(name, FLOOR),
        "cpu_low": cpu_low,
        "cpu_high": cpu_high,
        "scored": scored,  # tokens of the student, a round
    }


def _inputs(batch: Batch) -> str:
    own, other = batch.student, batch.views[0].read.teacher
    return digest(own.input_ids, other.input_ids, own.rows, other.rows)
