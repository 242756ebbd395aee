"""One arm, trained on one pair: the same prompts in the same order, steps, optimizer and lengths for all."""

from __future__ import annotations

import gc
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from arms import Arm
from datasets import Dataset
from measure import PeakMemory
from transformers import PreTrainedModel, PrinterCallback

from .bench import Bench
from .declaration import Budget
from .trl_gold import TRL_GOLD, gold_trainer


@dataclass(frozen=True)
class Trained:
    """A student after training."""

    model: PreTrainedModel
    facts: dict[str, Any]


def train(bench: Bench, arm: Arm, budget: Budget, rate: float, seed: int) -> Trained:
    """Train a fresh student. Off-policy arms and TRL's trainer read the teacher's texts, the others write their own.

    `facts`: seconds of training, and of the processor (models are loaded and texts written before the clocks start);
    peak memory in MiB above what the process held before; `one_to_one`, the share of one-to-one tokens at the end, and
    `loss`, where the trainer logs them.
    """
    on_policy = not arm.names(TRL_GOLD) and (arm.minillm or arm.options.get("lmbda", 1.0) == 1.0)
    count = budget.steps * budget.batch
    rows = (bench.prompts if on_policy else bench.texts)(seed, count)
    student, teacher = bench.student(), bench.teacher()
    with tempfile.TemporaryDirectory() as folder:
        options = _options(bench, budget, rate, seed, folder)
        data = Dataset.from_list(rows)
        if arm.names(TRL_GOLD):
            trainer = gold_trainer(arm, student, teacher, bench.tokenizers, options, data, Path(folder))
        else:
            ours: dict[str, Any] = dict(min_coverage=0.0, log_rollouts=0)
            if not on_policy and bench.teacher_cache is not None:
                ours["teacher_cache_dir"] = str(bench.teacher_cache)
            trainer = arm.trainer(
                student,
                teacher,
                options | ours,
                train_dataset=data,
                processing_class=bench.tokenizers[0],
                teacher_processing_class=bench.tokenizers[1],
            )
        trainer.remove_callback(PrinterCallback)
        began = time.perf_counter(), time.process_time()
        with _peak() as peak:
            trainer.train()
        seconds = time.perf_counter() - began[0], time.process_time() - began[1]
        logs = [log for log in trainer.state.log_history if "loss" in log]
    shares = [log["align/one_to_one"] for log in logs if log.get("align/one_to_one") is not None]
    facts = {
        "seconds": seconds[0],
        "cpu_seconds": seconds[1],
        "peak_mib": max(0, peak.bytes) / 2**20,
        "one_to_one": shares[-1] if shares else None,
        "loss": [float(log["loss"]) for log in logs],
        "steps": trainer.state.global_step,
    }
    del trainer
    gc.collect()
    return Trained(student.eval(), facts)


def _options(bench: Bench, budget: Budget, rate: float, seed: int, folder: str) -> dict[str, Any]:
    """What every arm is given, in the names of `TrainingArguments`."""
    common = dict(
        output_dir=folder,
        use_cpu=not torch.cuda.is_available(),
        max_steps=budget.steps,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(10, budget.steps // 5),
        per_device_train_batch_size=budget.batch,
        logging_steps=max(budget.steps // 5, 1),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    return common | bench.trainer_options


class _DevicePeak:
    """Bytes that torch held on the GPU at the highest point inside the block, above those at its start."""

    def __enter__(self) -> _DevicePeak:
        torch.cuda.reset_peak_memory_stats()
        self.start = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = torch.cuda.max_memory_allocated() - self.start


def _peak() -> PeakMemory | _DevicePeak:
    return _DevicePeak() if torch.cuda.is_available() else PeakMemory()
