"""The shapes of an objective: what it reads, and what it gives back unreduced."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from diglot.errors import ConfigError
from diglot.objectives.rungs import Rung

if TYPE_CHECKING:
    from diglot.alignment import Alignment
    from diglot.vocabulary import Vocabulary


@dataclass(frozen=True)
class Pair:
    """What two vocabularies and stop sets are to each other."""

    same: bool  # one table of ids: id i has the same bytes on both sides
    size_s: int  # width of the student's logits
    size_t: int  # width of the teacher's logits
    shared_s: Tensor  # int64 [K] student ids of the byte-equal, unambiguous, non-control tokens
    shared_t: Tensor  # int64 [K] their teacher ids
    stop_s: Tensor  # int64 ids that end a turn, student
    stop_t: Tensor  # int64 ids that end a turn, teacher

    @classmethod
    def of(cls, student: Vocabulary, teacher: Vocabulary, stop_s: Sequence[int], stop_t: Sequence[int]) -> Pair:
        """The pair of two vocabularies, whose lengths are the widths of the logits, and two stop sets."""
        shared_s, shared_t = student.shared(teacher)
        return cls(
            same=student.same_as(teacher),
            size_s=len(student),
            size_t=len(teacher),
            shared_s=torch.as_tensor(shared_s, dtype=torch.int64),
            shared_t=torch.as_tensor(shared_t, dtype=torch.int64),
            stop_s=torch.tensor(list(stop_s), dtype=torch.int64),
            stop_t=torch.tensor(list(stop_t), dtype=torch.int64),
        )

    def to(self, device: torch.device | str) -> Pair:
        """The same with its tensors on `device`."""
        return replace(self, **_moved(self, device))


@dataclass(frozen=True)
class Values:
    """An objective's values, one per row (or per segment, chunk, token), not reduced."""

    loss: Tensor  # [R] in nats
    metrics: dict[str, Tensor] = field(default_factory=dict)  # each [R], detached


@dataclass(frozen=True)
class Path:
    """Log-probabilities of what was written, in nats: each packed token given all that is before it.

    The stop token's is the log of the mass of the side's whole stop set.
    """

    logp_s: Tensor  # [N_s], carries the student's gradient
    logp_t: Tensor  # [N_t]
    logp_old: Tensor | None = None  # [N_s] the student's when it wrote the text
    weight: Tensor | None = None  # [N_s] importance weights, constants

    def to(self, device: torch.device | str) -> Path:
        """The same with its tensors on `device`."""
        return replace(self, **_moved(self, device))


class RowObjective(ABC):
    """A divergence between whole next-token distributions, row by row."""

    name: ClassVar[str]
    needs: ClassVar[Rung] = Rung.HIDDEN

    def __init__(self, pair: Pair) -> None:
        self.pair = pair

    def rows(self, alignment: Alignment[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Token indices `[R]`, student and teacher, whose rows are compared, and whether each is a stop row.

        The rows are those that predict the tokens of `alignment`'s one-to-one pairs.
        """
        return alignment.pair_s, alignment.pair_t, alignment.chunk_stop[alignment.chunk_s[alignment.pair_s]]

    @abstractmethod
    def __call__(self, logits_s: Tensor, logits_t: Tensor) -> Values:
        """Values `[R]` of `logits_s [R, V_s]` against `logits_t [R, V_t]`, computed in float32 (float64 if given)."""

    def to(self, device: torch.device | str) -> RowObjective:
        """Move the pair to `device`; returns self."""
        self.pair = self.pair.to(device)
        return self


class ColumnObjective(RowObjective):
    """A row objective that reads few columns of each row, chosen by the student.

    Where `reads_few`, calling the objective equals `compare` on the columns that `choose` names, so a head has to form
    no more of the teacher's logits than those.
    """

    @property
    @abstractmethod
    def reads_few(self) -> bool:
        """Do `choose` and `compare` say it all, with these options?"""

    @abstractmethod
    def choose(self, logits_s: Tensor) -> tuple[Tensor, Tensor]:
        """Ids of the columns that are read, `[R, k_s]` of the student and `[R, k_t]` of the teacher; constants."""

    @abstractmethod
    def compare(self, chosen_s: Tensor, chosen_t: Tensor) -> Tensor:
        """Values `[R]` from the logits of the chosen columns, `[R, k_s]` and `[R, k_t]`."""


class PathObjective(ABC):
    """A value of what was written, from its log-probabilities alone."""

    name: ClassVar[str]
    needs: ClassVar[Rung] = Rung.TEXT_LOGPROBS

    def mask(self, alignment: Alignment[Tensor]) -> Tensor:
        """Which of the values count, bool: here the student tokens that lie in a chunk, `[N_s]`."""
        return alignment.chunk_s >= 0

    @abstractmethod
    def __call__(self, path: Path, alignment: Alignment[Tensor]) -> tuple[Values, Tensor]:
        """One value per segment, chunk or token, and `mask(alignment)`."""


def at_least_float32(x: Tensor) -> Tensor:
    """`x` itself in float64, else in float32."""
    return x if x.dtype == torch.float64 else x.float()


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise `ConfigError` unless `low <= value <= high`."""
    if not low <= value <= high:
        raise ConfigError(f"{name}={value} is out of range: choose a value from {low} to {high}.")


def _moved(record: Any, device: torch.device | str) -> dict[str, Any]:
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    return {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
