"""The kinds of objectives: what each reads, and what it gives back unreduced."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from diglot.batches.sending import sent
from diglot.errors import ConfigError
from diglot.objectives.levels import Level
from diglot.objectives.pair import Pair
from diglot.objectives.scores import Metrics, Part, Path, Plan, Rows, Scores, Values

if TYPE_CHECKING:
    from diglot.alignment import Alignment
    from diglot.batches import Written


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
        inputs = {**rows.inputs, **self.extra(rows, scores.written, scores)}
        # A teacher that gives no more than its likeliest ids has no rows: what is read of it is given.
        with_teacher, temperature = self.needs > Level.TOP_K, 1.0 if self.divides_itself else scores.temperature
        loss, values = scores.rows(self, rows, inputs, share, with_teacher=with_teacher, temperature=temperature)
        # One entry for each item: the logged mean is the share in the window, however that was split.
        skipped = {
            f"skipped_{why}": torch.cat([torch.ones(n), torch.zeros(rows.items)]) for why, n in rows.skipped.items()
        }
        return loss, {"loss": values.loss, **values.metrics, **skipped}

    @abstractmethod
    def __call__(self, logits_s: Tensor, logits_t: Tensor, **inputs: Tensor) -> Values:
        """Values `[R]` of `logits_s [R, V_s]` against `logits_t [R, V_t]`, computed in float32 (float64 if given).

        `inputs` holds the same rows of what `rows` and `extra` gave.
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
        inputs = {"columns": of_student, "logps_t": logps_t}
        loss, values = scores.rows(self._chosen, rows, inputs, share, with_teacher=False)
        return loss, {"loss": values.loss, **values.metrics}

    def _chosen(self, logits_s: Tensor, logits_t: None, *, columns: Tensor, logps_t: Tensor) -> Values:
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
        metrics = {name: value[at] for name, value in {"loss": values.loss, **values.metrics}.items()}
        return share * metrics["loss"].sum(), metrics


def at_least_float32(x: Tensor) -> Tensor:
    """`x` itself in float64, else in float32."""
    return x if x.dtype == torch.float64 else x.float()


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise `ConfigError` unless `low <= value <= high`."""
    if not low <= value <= high:
        raise ConfigError(f"{name}={value} is out of range: choose a value from {low} to {high}.")
