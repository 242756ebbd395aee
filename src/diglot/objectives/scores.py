"""What an objective is given and gives back: plans, rows and paths of what was written, scores, values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from diglot.batches.sending import sent_together

if TYPE_CHECKING:
    from diglot.alignment import Alignment
    from diglot.batches import Written
    from diglot.objectives.tail import TailTokens

T = TypeVar("T")
Compare = Callable[..., "Values"]
Summary = Callable[[Tensor, slice], Tensor]
Metrics = Mapping[str, Tensor]


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


@dataclass(frozen=True)
class Rows:
    """Which rows of both sides are compared, and what is known about each beforehand."""

    student: Tensor  # int64 [R] token whose predicting row is read, student
    teacher: Tensor  # int64 [R] teacher
    inputs: Mapping[str, Tensor] = field(default_factory=dict)  # each [R, ...], handed to the objective by name
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
        s, t, *inputs = sent_together([self.student, self.teacher, *self.inputs.values()], device)
        named = dict(zip(self.inputs, inputs, strict=True))
        return replace(self, student=s, teacher=t, inputs=named, planned=self.on_host)


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
        inputs: Mapping[str, Tensor],
        share: float,
        *,
        with_teacher: bool = True,
        temperature: float | None = None,
    ) -> tuple[Tensor, Values]:
        """`share` times the sum of `compare(logits_s, logits_t, **inputs)` over rows, and their values.

        `rows` are on `device`. Without the teacher's rows `logits_t` is None. `temperature` is that of the scores
        when not given.
        """

    def part(self, part: Part, tokens: Tensor, share: float) -> tuple[Tensor, Values]:
        """The same of rows of hidden states that the objective has made itself; `tokens` are the student's, `[R]`."""

    def summarised_student(self, summary: Summary) -> Tensor:
        """`summary(logits [r, V_s], rows)` of the student's rows, a block at a time, joined; with gradient."""

    def summarised_teacher(self, summary: Summary) -> Tensor:
        """The same of the teacher's, constant; its logits come to `device`."""

    def stored_distributions(self, segment: Tensor, position: Tensor) -> Tensor | None:
        """The teacher's next-byte distributions at these bytes, `[I, 257]`, if that is what was kept of it."""

    def teacher_behind(self, tail: TailTokens) -> Tensor:
        """The teacher's hidden states behind each token of branches, `[E, H_t]`, constant.

        The first ones, if they are asked for before `hidden_t`, read the text as well; later ones read branches alone.
        """

    def teacher_log_probs(self, hidden: Tensor, ids: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Log-probs of rows of the teacher's hidden states, part by part.

        Each part is a slice of the rows and their log-probs `[r, V_t]`, on the teacher's device, to write on. With
        `ids`, `[k]` on that device: as if the teacher had these columns alone, `[r, k]`, so none is below the true one.
        """

    def once(self, by: object, make: Callable[[], T]) -> T:
        """`make()`, which is made of the teacher's answers alone: once for a text, however often it is trained on.

        `by` is the objective, or whatever else tells it from others.
        """

    # ---- hidden states

    @property
    def hidden_s(self) -> Tensor:
        """The hidden states that predict the student's tokens, `[N_s, H_s]`, with gradient."""

    @property
    def hidden_t(self) -> Tensor:
        """The teacher's, `[N_t, H_t]`, constant."""


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
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
