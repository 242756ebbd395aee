"""What a run is before it starts and what came of it: two blocks of lines, each of 80 columns."""

from __future__ import annotations

import importlib.util
import itertools
import math
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text

from diglot.cli.script import TrainArguments
from diglot.comparisons.auto import auto_objective
from diglot.data import to_sample
from diglot.errors import DataError
from diglot.memory import GIB, Plan, Shape, optimizer_bytes
from diglot.phases import phase
from diglot.report.runs import Run, load_run
from diglot.report.verdict import verdict
from diglot.teachers import LocalTeacher
from diglot.teachers.adapter import has_own_model
from diglot.trainers.base import DistillationTrainer

Line = tuple[str, str]
HEADROOM_ROWS = 8  # replies of the data that both models read before training


# ---- before ------------------------------------------------------------------------------------------------------


def print_start(trainer: DistillationTrainer, script: TrainArguments, resumed: str | None = None) -> None:
    """Which model is which, the objective and why, steps, memory; then what looks wrong."""
    _print("This run", [*start_lines(trainer, script), *([("resumed from", resumed)] if resumed else [])])
    for warning in [*swapped(trainer), *slow_types(trainer), *headroom(trainer)]:
        Console().print(Text(warning, style="yellow" if warning.startswith("!") else ""), highlight=False)


def start_lines(trainer: DistillationTrainer, script: TrainArguments) -> list[Line]:
    """(label, text) of each line."""
    args: Any = trainer.args
    trainable = sum(p.numel() for p in trainer.student.parameters() if p.requires_grad)
    lines = [("student", f"{script.model_name_or_path}: {_model(trainer.student)}, {_count(trainable)} trained")]
    for one in trainer.comparisons:
        name = (
            one.teacher.name or "a model in memory"
            if len(trainer.comparisons) == 1
            else f"{one.label} ({one.weight:.0%})"
        )
        about = f": {_model(one.teacher.model)}" if isinstance(one.teacher, LocalTeacher) else ""
        lines.append(("teacher", f"{name}{about}"))
        lines.append(("objective", f"{_terms(one)}{_why(one, args)}"))
        lines.append(
            ("vocabularies", "the same" if one.pair.same else f"differ, {len(one.pair.shared_s):,} shared tokens")
        )
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    lines.append(("data", f"{script.dataset_name}{_size(trainer.train_dataset)}"))
    lines.append(("steps", _steps(trainer, rows)))
    lines.append(("memory", _memory(trainer)))
    lines.append(("output", str(args.output_dir)))
    return lines


def _model(model: Any) -> str:
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{_count(model.num_parameters())} parameters, {dtype}, {model.device}"


def _count(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"


def _terms(comparison: Any) -> str:
    terms = comparison.terms
    return " + ".join(t.name if len(terms) == 1 else f"{t.weight:g} x {t.name}" for t in terms) or "none"


def _why(comparison: Any, args: Any) -> str:
    if args.objective != "auto":
        return ""
    return f" (auto: {auto_objective(comparison).reason})"


def _size(data: Any) -> str:
    return f", {len(data):,} rows" if isinstance(data, Dataset) else ", streamed"


def _steps(trainer: DistillationTrainer, rows: int) -> str:
    args: Any = trainer.args
    total, data = args.max_steps, trainer.train_dataset
    if total <= 0:
        per_epoch = math.ceil(len(data) / rows) if isinstance(data, Dataset) else 0
        total = math.ceil(per_epoch * args.num_train_epochs)
    passes = (
        f" ({total * rows / len(data):.3g} passes over the data)" if isinstance(data, Dataset) and len(data) else ""
    )
    each = "" if args.num_generations == 1 else f", {args.num_generations} completions each"
    return f"{total:,} steps of {rows} rows{each}{passes}"


def _memory(trainer: DistillationTrainer) -> str:
    plan = plan_of(trainer)
    if plan is None:
        return "not known for models of this kind; diglot estimate takes a size in the place of a name"
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in plan.parts.items() if size >= 0.005 * GIB)
    return f"up to {plan.total / GIB:.2f} GiB" + (f": {parts}" if parts else "")


def plan_of(trainer: DistillationTrainer) -> Plan | None:
    """What a step holds, as `diglot estimate` calculates it; None where a configuration does not say its shape."""
    args: Any = trainer.args
    models = [trainer.student, *trainer.teacher_models()]
    try:
        student, *teachers = [Shape.of_config(one.config.to_dict(), one.num_parameters()) for one in models]
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    trained = [p for p in trainer.student.parameters() if p.requires_grad]
    number, texts = sum(p.numel() for p in trained), args.per_device_train_batch_size * args.num_generations
    sizes = [float(sum(p.numel() * p.element_size() for p in one.parameters())) for one in models]
    return Plan(
        student,
        sizes[0],
        float(number),
        teachers=tuple(zip(teachers, sizes[1:], strict=True)),
        trained_itemsize=sum(p.numel() * p.element_size() for p in trained) / max(number, 1),
        optimizer=optimizer_bytes(str(getattr(args.optim, "value", args.optim))),
        texts=texts,
        sampled=0 if args.use_vllm else texts * args.gradient_accumulation_steps,
        length=args.max_length,
        completion=min(args.max_completion_length, args.max_length),
        compute=2.0 if args.bf16 or args.fp16 else 4.0,
        checkpointing=any(getattr(args, f"{kind}_checkpointing", False) for kind in ("activation", "gradient")),
    )


def swapped(trainer: DistillationTrainer) -> Iterator[str]:
    """A line for each teacher that is smaller than the student."""
    mine = trainer.student.num_parameters()
    for one in trainer.comparisons:
        if has_own_model(one.teacher):
            theirs = one.teacher.model.num_parameters()
            if theirs < 0.9 * mine:
                yield (
                    f"! The teacher ({_count(theirs)} parameters) is smaller than the student ({_count(mine)}). Are "
                    "they swapped? model_name_or_path is the student, which is trained."
                )


def slow_types(trainer: DistillationTrainer) -> Iterator[str]:
    """A line for each teacher of 16 bits on a CPU, which may read much more slowly than in float32."""
    for one in trainer.comparisons:
        if has_own_model(one.teacher):
            model: Any = one.teacher.model
            if model.device.type == "cpu" and model.dtype in (torch.bfloat16, torch.float16):
                dtype = str(model.dtype).removeprefix("torch.")
                yield (
                    f"! The teacher computes in {dtype}, which on a CPU may be several times slower than float32. With "
                    """memory for it: --teacher_model_init_kwargs '{"dtype": "float32"}'."""
                )


def headroom(trainer: DistillationTrainer) -> Iterator[str]:
    """What a few replies of the data say about who reads them better. Nothing of the run's state is changed."""
    if trainer.args.world_size > 1 or not isinstance(trainer.train_dataset, Dataset):
        return
    rows: Any = itertools.islice(trainer.train_dataset, HEADROOM_ROWS)
    samples = [s for i, row in enumerate(rows) if (s := to_sample(row, where=f"row {i}")).reply]
    for one in trainer.comparisons if samples else ():
        if not has_own_model(one.teacher):
            continue
        with phase("Both models read a few replies of the data"), trainer.accelerator.autocast():
            gaps, sizes = trainer.evaluator(one).reference_gap(samples)
        one.reader.take_dropped()
        if len(gaps) and sizes.sum():
            yield judge_headroom(gaps / math.log(2), sizes)


def judge_headroom(gaps: np.ndarray, sizes: np.ndarray) -> str:
    """What the gaps mean, with two standard errors.

    Args:
        gaps: bits by which the teacher reads each reply better than the student, `[M]`.
        sizes: its bytes, `[M]`.
    """
    mean = float(gaps.sum() / sizes.sum())
    error = 2 * float(np.sqrt(len(gaps) / max(len(gaps) - 1, 1) * ((gaps - mean * sizes) ** 2).sum()) / sizes.sum())
    where = f"{len(gaps)} replies of the data"
    if mean > error:
        return f"Head room: the teacher reads {where} better than the student, by {mean:.3f} ± {error:.3f} bits a byte."
    if mean < -error:
        return (
            f"! The teacher reads {where} worse than the student, by {-mean:.3f} ± {error:.3f} bits a byte. Are they "
            "swapped, or is it another language or domain than the teacher's?"
        )
    return (
        f"! On {where} the teacher is not clearly better than the student ({mean:+.3f} ± {error:.3f} bits a byte): "
        "there may be nothing to learn. Look at more: diglot inspect --with-models."
    )


# ---- after -------------------------------------------------------------------------------------------------------


def print_end(out: Path, script: TrainArguments, teacher: Any) -> None:
    """Before and after, a verdict in words, and what to do next."""
    try:
        run = load_run(out)
    except DataError:  # a run without logs
        run = None
    _print("Done", end_lines(run) if run is not None else [])
    console = Console()
    console.print(Text(f"The student is in {out}. Next:"), highlight=False)
    for command in next_commands(out, script, teacher):
        console.print(Text(f"  {command}"), highlight=False, soft_wrap=True)
    if importlib.util.find_spec("matplotlib") is None:
        console.print(Text("The report draws with matplotlib, which is missing: pip install 'diglot[report]'"))


def end_lines(run: Run) -> list[Line]:
    """(label, text): the distance to the teacher and to the data on the fixed prompts, and what it means."""
    lines = []
    before, after = run.before_after("fixed/kl_nats_per_byte")
    if before is not None and after is not None:
        noise = math.hypot(*(error or 0.0 for error in run.before_after("fixed/kl_error")))
        lines.append(("to the teacher", f"{before:.3f} -> {after:.3f} nats a byte (noise {noise:.3f}), own answers"))
        lines.append(("verdict", verdict(before, after, noise)))
    read_before, read_after = run.before_after("fixed/bits_per_byte")
    if read_before is not None and read_after is not None:
        lines.append(("to the data", f"{read_before:.3f} -> {read_after:.3f} bits a byte of its replies"))
    return lines


def next_commands(out: Path, script: TrainArguments, teacher: Any) -> list[str]:
    """The page about the run, and numbers against the student before training."""
    words = ["diglot", "eval", str(out), str(script.model_name_or_path)]
    words += ["--teacher", teacher] if isinstance(teacher, str) and Path(teacher).suffix != ".gguf" else []
    return [shlex.join(["diglot", "report", str(out)]), shlex.join([*words, "--data", str(script.dataset_name)])]


def _print(title: str, lines: Iterable[Line]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in lines:
        table.add_row(label, Text(text))
    console = Console()
    console.print(Text(title, style="bold"))
    if table.row_count:
        console.print(table)
