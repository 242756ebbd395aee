"""What a kind of pair has to offer, whatever its models are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .declaration import DeclarationError, PairDeclaration
from .measures import Measure

Split = Literal["validation", "test"]


class Bench(Protocol):
    """A pair that can be trained and measured. Every method gives the same each time it is called."""

    trainer_options: dict[str, Any]  # lengths, schedule: what all arms share beside the budget
    teacher_cache: Path | None  # where to keep what the teacher says about its own texts

    @property
    def tokenizers(self) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
        """The student's and the teacher's."""

    def student(self) -> PreTrainedModel:
        """The student before training, a copy of its own."""

    def teacher(self) -> PreTrainedModel:
        """The teacher."""

    def prompts(self, seed: int, count: int) -> list[dict[str, Any]]:
        """Training rows with a `prompt` alone."""

    def texts(self, seed: int, count: int) -> list[dict[str, Any]]:
        """The same rows with the teacher's own text as `completion`, sampled once and kept."""

    def measure(self, student: PreTrainedModel, split: Split) -> dict[str, Measure]:
        """The student on held-out items."""

    def measure_teacher(self, split: Split) -> dict[str, Measure]:
        """Of these, what a teacher alone has: not its divergence from itself."""


def open_bench(pair: PairDeclaration, folder: Path) -> Bench:
    """The pair's models and data; teacher's texts are kept in `folder`.

    Raises:
        DeclarationError: options that this kind does not have.
    """
    from .laboratory_bench import LaboratoryBench
    from .models_bench import ModelsBench
    from .sums_bench import SumsBench

    kinds: dict[str, Any] = {"laboratory": LaboratoryBench, "sums": SumsBench, "models": ModelsBench}
    try:
        return kinds[pair.kind](pair.budget, folder=folder, **pair.options)
    except TypeError as error:
        raise DeclarationError(f"pairs: {pair.name}: options {pair.options}: {error}") from error


def one_of(name: str, value: Any, known: Sequence[str]) -> None:
    """`DeclarationError` for an option that is none of these."""
    if value not in known:
        raise DeclarationError(f"option {name} {value!r} is not one of {', '.join(known)}.")
