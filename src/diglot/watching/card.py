"""The model card of a run: what its comparisons say of student and teachers, and what the run measured of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset

from diglot.comparisons import Comparison
from diglot.errors import DataError
from diglot.options import DistillationConfig
from diglot.report import CardFacts, TeacherFacts, model_card
from diglot.report.runs import Run, load_run
from diglot.vocabulary import Vocabulary

# Options that a card shows, of those that the run's configuration has.
SHOWN = (
    "max_steps", "num_train_epochs", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps",
    "lmbda", "beta", "kd_temperature", "temperature", "num_generations", "max_completion_length", "teacher_mixed_alpha",
)  # fmt: skip


def write_card(
    folder: Path,
    comparisons: Sequence[Comparison],
    method: str,
    student: str,
    model: Any,
    data: Any,
    args: DistillationConfig,
    model_name: str | None = None,
    dataset: str | list[str] | None = None,
    tags: str | list[str] | None = None,
    language: str | None = None,
    license: str | None = None,
) -> None:
    """Write `README.md` into `folder`.

    Args:
        method: "GKD" or "MiniLLM".
        student: the name of what was trained.
        model: it itself, which says whether it is an adapter.
        data: the rows that it was trained on.
        model_name: by default the folder's.
    """
    facts = CardFacts(
        model_name=model_name or folder.resolve().name,
        student=student,
        teachers=[_teacher(one) for one in comparisons],
        method=method,
        vocabulary=_vocabulary(comparisons[0].reader.student.vocabulary),
        versions=", ".join(f"{name} {version(name)}" for name in ("diglot", "transformers", "torch")),
        adapter=hasattr(model, "peft_config"),
        datasets=_list(dataset),
        rows=len(data) if isinstance(data, Dataset) else None,
        options=_options(args),
        run=_run(folder),
        tags=_list(tags),
        language=language,
        license=license,
    )
    model_card(facts).save(folder / "README.md")


def _teacher(one: Comparison) -> TeacherFacts:
    mine, theirs = one.reader.student.vocabulary, one.teacher.renderer.vocabulary
    terms = {term.name: term.weight for term in one.terms}
    return TeacherFacts(one.teacher.model_name, terms, _vocabulary(theirs), mine.explain_difference(theirs))


def _vocabulary(one: Vocabulary) -> str:
    return f"{one.kind}, {len(one):,} rows"


def _options(args: DistillationConfig) -> dict[str, object]:
    """Those that were set, or are in force by default; -1 steps and no value say nothing."""
    names = [f.name for f in fields(args)]
    options = {name: getattr(args, name) for name in SHOWN if name in names}
    if options["max_steps"] > 0:
        del options["num_train_epochs"]
    return {name: value for name, value in options.items() if value is not None and (name, value) != ("max_steps", -1)}


def _run(folder: Path) -> Run | None:
    try:
        return load_run(folder)
    except DataError:  # a run without logs, or one whose logs are damaged: a card is not the place to stop for it
        return None


def _list(names: str | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])
