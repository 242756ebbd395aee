"""The model card of a run: what its comparisons say of student and teachers."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from diglot.comparisons import Comparison
from diglot.report import model_card


def write_card(
    folder: Path,
    comparisons: Sequence[Comparison],
    method: str,
    student: str,
    model_name: str | None = None,
    dataset: str | list[str] | None = None,
    tags: str | list[str] | None = None,
) -> None:
    """Write `README.md` into `folder`: `student`, its teachers, the method ("GKD" or "MiniLLM") and versions.

    The vocabularies are those of the first comparison. Without a name the model is called as its folder.
    """
    first = comparisons[0]
    vocabulary_s, vocabulary_t = first.reader.student.vocabulary, first.teacher.renderer.vocabulary
    card = model_card(
        model_name=model_name or folder.name,
        student=student,
        teacher=", ".join(one.teacher.name for one in comparisons),
        dataset=dataset if isinstance(dataset, str) else ", ".join(dataset or []) or None,
        method=method,
        vocabulary_s=f"{vocabulary_s.kind}, {len(vocabulary_s)} rows",
        vocabulary_t=f"{vocabulary_t.kind}, {len(vocabulary_t)} rows",
        relation=vocabulary_s.explain_difference(vocabulary_t) or "the same table",
        versions=", ".join(f"{name} {version(name)}" for name in ("diglot", "transformers", "torch")),
        tags=[tags] if isinstance(tags, str) else tags,
    )
    card.save(folder / "README.md")
