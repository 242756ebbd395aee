"""What the benchmarks share: the demo pair on real text, peak memory, and who measured."""

from __future__ import annotations

import hashlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
from assets import fetch_model, fetch_texts
from assets import fetch_tokenizer as fetch_tokenizer

from diglot import GKDConfig, GKDTrainer
from diglot.comparisons import Batch, Entry, Term, terms_of
from diglot.comparisons.projectors import make_projectors
from diglot.teachers import local


class BenchError(RuntimeError):
    """Two sides of a comparison that did not do the same work, or a measurement that failed."""


def check_same(what: str, **sides: Any) -> None:
    """Raise `BenchError` unless all sides hold the same value."""
    (first, value), *others = sides.items()
    for name, other in others:
        if other != value:
            raise BenchError(
                f"{what} differ: {first} has {value!r}, {name} has {other!r}. The two sides of a comparison must work "
                "on the same; the numbers would mean nothing."
            )


def digest(*parts: Any) -> str:
    """A short name of what is in arrays, texts and numbers."""
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(repr(part.tolist() if hasattr(part, "tolist") else part).encode())
    return hasher.hexdigest()[:16]


@dataclass(frozen=True)
class Timing:
    """Seconds of each side in every round, in the order of the rounds."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, side: str) -> float:
        """The side's median."""
        return statistics.median(self.seconds[side])

    def ratio(self, side: str, other: str) -> float:
        """Median over the rounds of `side / other`: what slows a whole round down cancels."""
        return statistics.median(self._ratios(side, other))

    def spread(self, side: str, other: str) -> tuple[float, float]:
        """The smallest and the largest of these ratios."""
        ratios = self._ratios(side, other)
        return min(ratios), max(ratios)

    def _ratios(self, side: str, other: str) -> list[float]:
        return [a / b for a, b in zip(self.seconds[side], self.seconds[other], strict=True)]


def alternate(sides: Mapping[str, Callable[[], float | None]], repeats: int, warm_up: bool = True) -> Timing:
    """Run the sides in turn, in the other order every time. A side may return its own seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + warm_up):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            own = sides[name]()
            if turn or not warm_up:
                seconds[name].append(time.perf_counter() - start if own is None else own)
    return Timing(seconds)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns under each other, the first one to the left."""
    lines = [tuple(head), *(tuple(_shown(cell) for cell in row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    aligned = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join(aligned)


def _shown(cell: Any) -> str:
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def term_for(trainer: GKDTrainer, name: str, **options: Any) -> Term:
    """The objective as the only term of a trainer's loss."""
    (compared,) = trainer.comparisons
    (term,) = terms_of([Entry(name, 1.0, options)], compared.pair, {})
    term.objective.to(trainer.args.device)
    make_projectors([term], trainer.student_head, local(compared.teacher, "A benchmark").head)
    return term


def rows_of_text(rows: int, words: int = 48) -> list[dict[str, str]]:
    """Real prose cut into a prompt of twelve words and the rest of `words` as its completion."""
    texts = [row["text"].split(" ") for row in fetch_texts("passages", "train")[:rows]]
    return [{"prompt": " ".join(w[:12]), "completion": " " + " ".join(w[12:words])} for w in texts]


def demo_trainer(objective: Any, rows: int, words: int = 48, **options: Any) -> GKDTrainer:
    """The demo pair on reference text: off-policy, so that no generation is timed."""
    student, teacher = (fetch_model(name) for name in ("smollm2-135m-instruct", "gemma-3-270m"))
    defaults = dict(output_dir="runs/bench", lmbda=0.0, beta=1.0, per_device_train_batch_size=rows, use_cpu=True)
    args = GKDConfig(objective=objective, **{**defaults, **options})
    return GKDTrainer(
        AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32),
        AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32),
        args,
        train_dataset=Dataset.from_list(rows_of_text(rows, words)),
        processing_class=AutoTokenizer.from_pretrained(student),
    )


def prepared_batch(trainer: GKDTrainer) -> Batch:
    """All rows of the trainer's data, read and aligned."""
    data: Any = trainer.train_dataset
    samples = trainer.data_collator([data[i] for i in range(len(data))])
    (inputs,), _ = trainer.get_batch_samples(iter([samples]), 1, trainer.args.device)
    return inputs["batch"]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A real tokenizer: `smollm2`, or one of `assets.TOKENIZERS`."""
    folder = fetch_model("smollm2-135m-instruct") if name == "smollm2" else fetch_tokenizer(name)
    return AutoTokenizer.from_pretrained(folder)


class PeakMemory:
    """Bytes of resident memory at the highest point inside the block, above those at its start (Linux).

    `start`: count from this level instead. What an allocator kept of an earlier run would hide from the next one.
    """

    def __init__(self, start: int | None = None) -> None:
        self.level = start

    def __enter__(self) -> PeakMemory:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        self.start = _status("VmRSS") if self.level is None else self.level
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = _status("VmHWM") - self.start


def resident() -> int:
    """Bytes of resident memory now."""
    return _status("VmRSS")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def machine() -> str:
    """Processor, threads and versions, for the head of a table."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, python {platform.python_version()}"
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {versions}, {_installed('trl')}"


def _installed(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"
