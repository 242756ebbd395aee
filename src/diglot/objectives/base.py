"""The shapes of an objective: what it reads, and what it gives back unreduced."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from diglot.batches.sending import sent, sent_together
from diglot.errors import ConfigError
from diglot.objectives.levels import Level

if TYPE_CHECKING:
    from diglot.alignment import Alignment
    from diglot.batches import Written
    from diglot.objectives.tail import TailTokens
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
    prompt: Tensor | None = None  # int64 [segments] which prompt a segment answers, of the student's own samples

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
    planned: Rows | None = None  # the same on the host, of rows that were sent to a device

    @property
    def items(self) -> int:
        """Over how many items the values are averaged."""
        return len(self.student) if self.count is None else self.count

    @property
    def on_host(self) -> Rows:
        """As they were planned: reading them waits for no device."""
        return self.planned or self

    def to(self, device: torch.device | str) -> Rows:
        """The same with its tensors on `device`."""
        s, t, *given = sent_together([self.student, self.teacher, *self.given.values()], device)
        named = dict(zip(self.given, given, strict=True))
        return replace(self, student=s, teacher=t, given=named, planned=self.on_host)


class Plan(Protocol):
    """What the text alone says about an objective, found in numpy before any model runs."""

    @property
    def items(self) -> int:
        """Over how many items the values are averaged."""


@dataclass(frozen=True)
class Rollout:
    """What is known of the student's tokens from when they were written, constants, `[N_s]` unless said otherwise."""

    logp_old: Tensor  # the student's log-probs, nats
    logp_t: Tensor  # [N_t] the teacher's
    weight: Tensor | None = None  # importance weights of teacher-mixed sampling
    advantage: Tensor | None = None
    explained: Tensor | None = None  # what a single step says of them, see `Objective.explained`


class Scores(Protocol):
    """What both models say about a text. Objectives pull from it what they need; nothing is computed twice.

    A teacher that does not give what is pulled raises `TeacherError`; `needs` lets that be found at the start.
    """

    temperature: float
    """Divides the logits of both sides, in rows, summaries and `path`."""

    @property
    def device(self) -> torch.device:
        """Where the student's values are."""

    @property
    def written(self) -> Written:
        """The tokens of both sides, in numpy."""

    @property
    def alignment(self) -> Alignment[Tensor]:
        """Their alignment, on `device`."""

    @property
    def on_policy(self) -> bool:
        """Is it the student's own sample?"""

    @property
    def rollout(self) -> Rollout | None:
        """Of text that the student wrote some optimizer steps ago."""

    @property
    def sampler_weight(self) -> Tensor | None:
        """The student's probability of each of its tokens over that of the engine that sampled it, `[N_s]`."""

    # ---- the text that was written

    @property
    def path(self) -> Path:
        """Log-probs of the text, at the temperature of the divergence."""

    @property
    def text(self) -> Path:
        """Log-probs of the text of the models themselves, and weights of its tokens."""

    def student_text(self, temperature: float) -> Tensor:
        """Log-probs of the student's tokens, `[N_s]`, nats, with gradient."""

    @property
    def boundaries(self) -> tuple[Tensor, Tensor]:
        """Log mass of "a new word begins, or the turn ends" in the row of each token, `[N_s]` and `[N_t]`."""

    @property
    def reference_texts(self) -> tuple[Tensor, Tensor]:
        """Log-probs of the text under the student before training and a reference teacher, `[N_s]` and `[N_t]`."""

    @property
    def teacher_gives_rows(self) -> bool:
        """Are there whole rows of the teacher? Else what is read of it is asked for by its ids."""

    # ---- single entries of rows

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

    # ---- whole rows, never all at once

    def rows(
        self,
        compare: Compare,
        rows: Rows,
        given: Mapping[str, Tensor],
        share: float,
        *,
        with_teacher: bool = True,
        temperature: float | None = None,
    ) -> tuple[Tensor, Values]:
        """`share` times the sum of `compare(logits_s, logits_t, **given)` over rows, and their values.

        `rows` are on `device`. Without the teacher's rows `logits_t` is None. `temperature` is that of the scores
        when not given.
        """

    def part(self, part: Part, tokens: Tensor, share: float) -> tuple[Tensor, Values]:
        """The same of rows of hidden states that the objective has made itself; `tokens` are the student's, `[R]`."""

    def summarised_student(self, summary: Summary) -> Tensor:
        """`summary(logits [r, V_s], rows)` of the student's rows, a block at a time, joined; with gradient."""

    def summarised_teacher(self, summary: Summary) -> Tensor:
        """The same of the teacher's, constant; its logits come to `device`."""

    def kept_distributions(self, segment: Tensor, position: Tensor) -> Tensor | None:
        """The teacher's next-byte distributions at these bytes, `[I, 257]`, if that is what was kept of it."""

    def teacher_rows(self, tail: TailTokens) -> Iterator[tuple[slice, Tensor]]:
        """Log-probs of the teacher's rows, part by part: those that predict its tokens, then those behind branches.

        Each part is a slice of the `N_t + E` rows and their log-probs `[r, V_t]`, on the teacher's device, to write on.
        """

    def teacher_rows_behind(self, tail: TailTokens) -> Iterator[tuple[slice, Tensor]]:
        """The same of the rows behind other branches alone, `E` of them: what the first rows gave reason to ask."""

    # ---- hidden states

    @property
    def hidden_s(self) -> Tensor:
        """The hidden states that predict the student's tokens, `[N_s, H_s]`, with gradient."""

    @property
    def hidden_t(self) -> Tensor:
        """The teacher's, `[N_t, H_t]`, constant."""


Compare = Callable[..., "Values"]
Summary = Callable[[Tensor, slice], Tensor]
Metrics = Mapping[str, Tensor]


class Objective(ABC):
    """How far apart student and teacher are: `plan` before the models run, `loss` when they have.

    A class that reads the vocabularies takes `pair` as the first argument of its constructor; all others are options,
    by keyword. See docs/own-objective.md.
    """

    name: ClassVar[str]
    needs: Level = Level.HIDDEN
    """The least that the teacher must give."""
    top: int = 0  # how many of the teacher's likeliest ids of a row it reads
    at_temperature: bool = True  # does `kd_temperature` act on what it compares?
    depends_on_split: ClassVar[bool] = False  # does the loss depend on which samples share a micro-batch?

    @property
    def reads_references(self) -> bool:
        """Does it pull `reference_texts`?"""
        return False

    @property
    def is_single_step(self) -> bool:
        """Is it the reverse KL of its rows against targets that depend on the past alone? See `explained`."""
        return False

    def explained(self, plan: Any, scores: Scores) -> Tensor:
        """What a single step says of each written token, its target's log-mass minus the student's, nats, `[N_s]`.

        A policy gradient leaves it out. NaN at tokens whose row the objective does not compare.
        """
        raise NotImplementedError(f"objective {self.name!r} is no single step")

    @abstractmethod
    def plan(self, written: Written) -> Plan:
        """What the text alone says: what is compared, and over how many `items` the values are averaged."""

    @abstractmethod
    def loss(self, plan: Any, scores: Scores, share: float) -> tuple[Tensor, Metrics]:
        """`share` times the sum of the items' values in nats, with gradient, and metrics `[items]` without."""

    def to(self, device: torch.device | str) -> None:
        """Move what it has made of the vocabularies to `device`."""
        for name, value in vars(self).items():
            if isinstance(value, (Tensor, Pair)):
                setattr(self, name, value.to(device))

    def parameters(self, weight_s: Tensor, weight_t: Tensor) -> Mapping[str, nn.Parameter]:
        """Trainable parameters, made for the two output embeddings `[V_s, H_s]` and `[V_t, H_t]`. Most have none."""
        return {}


class PairObjective(Objective):
    """An objective that is made for a pair of vocabularies."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair


class RowObjective(PairObjective):
    """A divergence between next-token distributions, row by row."""

    divides_itself: ClassVar[bool] = False
    """Has it an option `kd_temperature` and divides logits itself? It then gets them as the models give them."""

    def rows(self, written: Written) -> Rows:
        """Which rows are compared: here those that predict the tokens of the one-to-one pairs."""
        alignment = written.alignment
        return Rows(torch.from_numpy(alignment.pair_s), torch.from_numpy(alignment.pair_t))

    def plan(self, written: Written) -> Rows:
        return self.rows(written)

    def extra(self, rows: Rows, written: Written, scores: Scores) -> dict[str, Tensor]:
        """More that the objective is given of each row, `[R, ...]`, from scores of the text; may carry gradient.
        Sizes that the host has to know stay on the host."""
        return {}

    def loss(self, plan: Rows, scores: Scores, share: float) -> tuple[Tensor, Metrics]:
        rows = plan.to(scores.device)
        given = {**rows.given, **self.extra(rows, scores.written, scores)}
        # A teacher that gives no more than its likeliest ids has no rows: what is read of it is given.
        with_teacher, temperature = self.needs > Level.TOP_K, 1.0 if self.divides_itself else scores.temperature
        loss, values = scores.rows(self, rows, given, share, with_teacher=with_teacher, temperature=temperature)
        # One entry for each item: the logged mean is the share in the window, however that was split.
        skipped = {
            f"skipped_{why}": torch.cat([torch.ones(n), torch.zeros(rows.items)]) for why, n in rows.skipped.items()
        }
        return loss, {"loss": values.loss, **values.metrics, **skipped}

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
        """Values `[R]` from the logits of the chosen columns, `[R, k_s]` and `[R, k_t]`, of which each row may be
        shifted."""

    def loss(self, plan: Rows, scores: Scores, share: float) -> tuple[Tensor, Metrics]:
        """As of any rows; a teacher that gives no whole ones is asked for the chosen columns, once they are known."""
        if scores.teacher_gives_rows:
            return super().loss(plan, scores, share)
        rows = plan.to(scores.device)
        widths = [0, 0]

        def choices(logits: Tensor, at: slice) -> Tensor:
            chosen = self.choose(logits)
            widths[:] = [columns.shape[1] for columns in chosen]
            return torch.cat(chosen, dim=-1).double()

        with torch.no_grad():
            of_all = scores.summarised_student(choices)[rows.student].long()
        of_student, of_teacher = of_all[:, : widths[0]], of_all[:, widths[0] :]
        token = rows.teacher.repeat_interleave(of_teacher.shape[1])
        logps_t = scores.teacher_logps(token, of_teacher.flatten()).view_as(of_teacher)
        given = {"columns": of_student, "logps_t": logps_t}
        loss, values = scores.rows(self._chosen, rows, given, share, with_teacher=False)
        return loss, {"loss": values.loss, **values.metrics}

    def _chosen(self, logits_s: Tensor, logits_t: Tensor | None, *, columns: Tensor, logps_t: Tensor) -> Values:
        logits_s = at_least_float32(logits_s)
        chosen = logits_s.gather(-1, columns)
        with torch.no_grad():
            mass_s = (chosen.logsumexp(-1) - logits_s.logsumexp(-1)).exp()
        loss = self.compare(chosen, logps_t.to(chosen.dtype))
        return Values(loss, {"mass_s": mass_s, "mass_t": logps_t.exp().sum(-1)})


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

    def loss(self, plan: Any, scores: Scores, share: float) -> tuple[Tensor, Metrics]:
        plan = plan.to(scores.device)
        of_student = scores.summarised_student(self.summary_s(plan))
        values = self(of_student, scores.summarised_teacher(self.summary_t(plan)), plan)
        return share * values.loss.sum(), {"loss": values.loss, **values.metrics}


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

    def parameters(self, weight_s: Tensor, weight_t: Tensor) -> Mapping[str, nn.Parameter]:
        self.prepare(weight_s, weight_t)
        return dict(self.projectors.items())

    @abstractmethod
    def prepare(self, weight_s: Tensor, weight_t: Tensor) -> None:
        """Make the projectors for the two output embeddings, `[V_s, H_s]` and `[V_t, H_t]`."""

    @abstractmethod
    def rows(self, written: Written) -> Rows:
        """Which rows are compared."""

    @abstractmethod
    def parts(self, rows: Rows, hidden_s: Tensor, hidden_t: Tensor) -> list[Part]:
        """The comparisons; their values are added up."""

    def plan(self, written: Written) -> Rows:
        return self.rows(written)

    def loss(self, plan: Rows, scores: Scores, share: float) -> tuple[Tensor, Metrics]:
        rows = plan.to(scores.device)
        metrics: dict[str, Tensor] = {}
        total, losses = scores.hidden_s.new_zeros(()), scores.hidden_s.new_zeros(len(rows.student))
        for part in self.parts(rows, scores.hidden_s, scores.hidden_t):
            of_part, values = scores.part(part, rows.student, share)
            total, losses = total + of_part, losses + values.loss
            metrics |= {part.name: values.loss, **values.metrics}
        return total, {"loss": losses, **metrics}


@dataclass(frozen=True)
class Mask:
    """Which values of a `PathObjective` count."""

    mask: Tensor  # bool, on the CPU

    @property
    def items(self) -> int:
        """How many."""
        return int(self.mask.sum())


class PathObjective(Objective):
    """A value of what was written, from its log-probabilities alone."""

    needs = Level.TEXT_LOGPROBS
    at_temperature = False

    @property
    def reads_boundaries(self) -> bool:
        """Does it read the boundary masses of the path? They take the teacher's whole rows."""
        return False

    @property
    def reads_references(self) -> bool:
        """Does it read the log-probabilities of the two reference models?"""
        return False

    def mask(self, alignment: Alignment[Tensor]) -> Tensor:
        """Which of the values count, bool: here the student tokens that lie in an exact chunk, `[N_s]`."""
        inside: Tensor = alignment.in_exact_chunk(alignment.chunk_s)
        return inside

    @abstractmethod
    def __call__(self, path: Path, alignment: Alignment[Tensor]) -> tuple[Values, Tensor]:
        """One value per segment, chunk or token, and `mask(alignment)`."""

    def plan(self, written: Written) -> Mask:
        return Mask(self.mask(written.alignment.to("cpu")))

    def path(self, scores: Scores) -> Path:
        """What it reads of the scores."""
        path = scores.text
        if self.reads_boundaries:
            boundary_s, boundary_t = scores.boundaries
            path = replace(path, boundary_s=boundary_s, boundary_t=boundary_t)
        if self.reads_references:
            reference_s, reference_t = scores.reference_texts
            path = replace(path, logp_reference_s=reference_s, logp_reference_t=reference_t)
        return path

    def loss(self, plan: Mask, scores: Scores, share: float) -> tuple[Tensor, Metrics]:
        values, _ = self(self.path(scores), scores.alignment)
        at = sent(plan.mask.nonzero()[:, 0], scores.device)  # a mask on the device would make the host wait for it
        found = {name: value[at] for name, value in {"loss": values.loss, **values.metrics}.items()}
        return share * found["loss"].sum(), found


def at_least_float32(x: Tensor) -> Tensor:
    """`x` itself in float64, else in float32."""
    return x if x.dtype == torch.float64 else x.float()


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise `ConfigError` unless `low <= value <= high`."""
    if not low <= value <= high:
        raise ConfigError(f"{name}={value} is out of range: choose a value from {low} to {high}.")


def _moved(record: Any, device: torch.device | str) -> dict[str, Any]:
    return {f.name: v.to(device) for f in fields(record) if isinstance(v := getattr(record, f.name), Tensor)}
