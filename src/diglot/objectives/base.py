"""The shapes of an objective: what it reads, and what it gives back unreduced."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from diglot.errors import ConfigError
from diglot.objectives.levels import Level

if TYPE_CHECKING:
    from diglot.alignment import Alignment
    from diglot.batches import Written
    from diglot.vocabulary import Encoded, Vocabulary


Encode = Callable[[Sequence[str]], Sequence["Encoded"]]


@dataclass(frozen=True)
class Tables:
    """What the tokens of both sides are."""

    student: Vocabulary
    teacher: Vocabulary
    encode_s: Encode | None = None
    encode_t: Encode | None = None


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
    tables: Tables | None = None  # the vocabularies themselves, for objectives that look into tokens

    @classmethod
    def of(
        cls,
        student: Vocabulary,
        teacher: Vocabulary,
        stop_s: Sequence[int],
        stop_t: Sequence[int],
        encode_s: Encode | None = None,
        encode_t: Encode | None = None,
    ) -> Pair:
        """The pair of two vocabularies, whose lengths are the widths of the logits, and two stop sets.

        `encode_s` and `encode_t` turn texts into each side's tokens; few objectives ask for them.
        """
        shared_s, shared_t = student.shared(teacher)
        return cls(
            same=student.same_as(teacher),
            size_s=len(student),
            size_t=len(teacher),
            shared_s=torch.as_tensor(shared_s, dtype=torch.int64),
            shared_t=torch.as_tensor(shared_t, dtype=torch.int64),
            stop_s=torch.tensor(list(stop_s), dtype=torch.int64),
            stop_t=torch.tensor(list(stop_t), dtype=torch.int64),
            tables=Tables(student, teacher, encode_s, encode_t),
        )

    def need_tables(self, name: str) -> Tables:
        """The vocabularies. `ConfigError` if the pair was made without them."""
        if self.tables is None:
            raise ConfigError(f"objective {name!r} looks into tokens, and this pair has no vocabularies: use Pair.of.")
        return self.tables

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
    sampler_weight: Tensor | None = None  # [N_s] the student's probability over that of the engine that sampled, cut
    noncanonical: Tensor | None = None  # bool [N_s] would the student's tokenizer cut the text otherwise here?
    boundary_s: Tensor | None = None  # [N_s] log mass, in the row of each token, of "a new word, or the end"
    boundary_t: Tensor | None = None  # [N_t]
    logp_reference_s: Tensor | None = None  # [N_s] of the student before training, constants
    logp_reference_t: Tensor | None = None  # [N_t] of a reference teacher, constants

    def to(self, device: torch.device | str) -> Path:
        """The same with its tensors on `device`."""
        return replace(self, **_moved(self, device))


@dataclass(frozen=True)
class Rows:
    """Which rows of both sides are compared, and what is known about each beforehand."""

    student: Tensor  # int64 [R] token whose predicting row is read, student
    teacher: Tensor  # int64 [R] teacher
    given: Mapping[str, Tensor] = field(default_factory=dict)  # each [R, ...], handed to the objective by name
    count: int | None = None  # over how many items the values are averaged, if not over the rows
    skipped: Mapping[str, int] = field(default_factory=dict)  # reason -> rows that were left out on purpose

    @property
    def items(self) -> int:
        """Over how many items the values are averaged."""
        return len(self.student) if self.count is None else self.count

    def to(self, device: torch.device | str) -> Rows:
        """The same with its tensors on `device`."""
        given = {name: value.to(device) for name, value in self.given.items()}
        return replace(self, student=self.student.to(device), teacher=self.teacher.to(device), given=given)


class Teller(Protocol):
    """Answers what rows of other positions say, for objectives that ask for it (`extra`)."""

    @property
    def path(self) -> Path:
        """Log-probs of the text, at the temperature of the divergence."""

    def student_logps(self, token: Tensor, ids: Tensor) -> Tensor:
        """Log-prob of `ids` in the student's rows that predict `token`, `[Q]`; carries gradient."""

    def teacher_logps(self, token: Tensor, ids: Tensor) -> Tensor:
        """The same of the teacher, constant."""

    def teacher_ranges(self, token: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Log of the teacher's mass on `sorted_ids[low:high]` in the row that predicts `token`, `[Q]`, constant.

        `sorted_ids` is the order of the teacher's tokens by bytes (`Vocabulary.trie`).
        """

    def teacher_top(self, token: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The teacher's likeliest `k` ids in the rows that predict `token` and their log-probs, `[Q, k]`, constant.

        Best first; where there are fewer, ids are -1 and log-probs -inf.
        """


class PairObjective(ABC):
    """What objectives have in common that read distributions: the pair of vocabularies that they are made for."""

    name: ClassVar[str]
    needs: ClassVar[Level] = Level.HIDDEN
    balanced_with_ce: ClassVar[bool] = False  # is the loss scaled to the cross-entropy of its rows, and that added?

    def __init__(self, pair: Pair) -> None:
        self.pair = pair

    def to(self, device: torch.device | str) -> None:
        """Move the pair, and the tensors that the objective made of it, to `device`."""
        self.pair = self.pair.to(device)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))


class RowObjective(PairObjective):
    """A divergence between next-token distributions, row by row."""

    def rows(self, written: Written) -> Rows:
        """Which rows are compared: here those that predict the tokens of the one-to-one pairs."""
        alignment = written.alignment
        return Rows(torch.from_numpy(alignment.pair_s), torch.from_numpy(alignment.pair_t))

    @property
    def is_single_step(self) -> bool:
        """Is it the whole single-step reverse KL of its rows, so that a policy gradient need not reward them for it?"""
        return False

    def extra(self, rows: Rows, written: Written, teller: Teller) -> dict[str, Tensor]:
        """More that the objective is given of each row, `[R, ...]`, from scores of the text; may carry gradient."""
        return {}

    @abstractmethod
    def __call__(self, logits_s: Tensor, logits_t: Tensor, **given: Tensor) -> Values:
        """Values `[R]` of `logits_s [R, V_s]` against `logits_t [R, V_t]`, computed in float32 (float64 if given).

        `given` holds the same rows of what `rows` and `extra` gave.
        """


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


class SummaryObjective(PairObjective):
    """A comparison of short summaries of the rows of both sides, several rows of each at a time.

    Unlike a `RowObjective` it may take rows of several positions together; what it keeps of each row must be short.
    """

    @abstractmethod
    def plan(self, written: Written) -> Any:
        """All that the text alone says: which entries of the summaries are compared. Has `items`, their number."""

    @abstractmethod
    def summary_s(self, plan: Any) -> Callable[[Tensor, slice], Tensor]:
        """Maps logits `[r, V_s]` of a slice of the student's scored tokens to the summary of those rows."""

    @abstractmethod
    def summary_t(self, plan: Any) -> Callable[[Tensor, slice], Tensor]:
        """The same for the teacher."""

    @abstractmethod
    def __call__(self, summary_s: Tensor, summary_t: Tensor, plan: Any) -> Values:
        """Values `[items]`."""


@dataclass(frozen=True)
class Part:
    """One comparison of a `ProjectedObjective`: rows of logits of either head on hidden states of either side."""

    name: str
    compare: Callable[..., Values]  # like a `RowObjective`; its second argument is None where `right` is
    left: Tensor  # hidden states that the gradient goes to
    left_head: str  # "student", or "frozen_student" or "teacher", which get no gradient
    right: Tensor | None  # hidden states of the constant side, read by `right_head`
    right_head: str
    rows_left: Tensor
    rows_right: Tensor
    given: Mapping[str, Tensor] = field(default_factory=dict)


class ProjectedObjective(PairObjective):
    """Comparisons of hidden states that trainable maps carry from one model's space into the other's.

    The maps are `projectors`, made by `prepare`; they are trained and saved with the student, and are no part of it.
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__(pair)
        self.projectors: nn.ParameterDict = nn.ParameterDict()

    @abstractmethod
    def prepare(self, weight_s: Tensor, weight_t: Tensor) -> None:
        """Make the projectors for the two output embeddings, `[V_s, H_s]` and `[V_t, H_t]`."""

    @abstractmethod
    def rows(self, written: Written) -> Rows:
        """Which rows are compared."""

    @abstractmethod
    def parts(self, rows: Rows, hidden_s: Tensor, hidden_t: Tensor) -> list[Part]:
        """The comparisons; their values are added up."""


class PathObjective(ABC):
    """A value of what was written, from its log-probabilities alone."""

    name: ClassVar[str]
    needs: ClassVar[Level] = Level.TEXT_LOGPROBS
    balanced_with_ce: ClassVar[bool] = False

    @property
    def reads_boundaries(self) -> bool:
        """Does it read the boundary masses of the path? They take the teacher's whole rows."""
        return False

    @property
    def reads_references(self) -> bool:
        """Does it read the log-probabilities of the two reference models?"""
        return False

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
