"""What both models say about one view of a batch, for objectives to pull from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from diglot.alignment import Alignment
from diglot.batches import AlignedBatch, PackedSide, Written
from diglot.batches.sending import sent
from diglot.comparisons.comparison import Answers, Batch, View
from diglot.errors import ConfigError, TeacherError
from diglot.heads import (
    Head,
    TreeReading,
    log_softmax,
    logits_by_parts,
    reads_few_columns,
    reduce_rows,
    summaries,
    token_logps,
)
from diglot.heads.rows import at_temperature
from diglot.objectives import Part, Path, Rollout, Rows, Values
from diglot.objectives.scores import Compare, Summary
from diglot.objectives.tail import TailTokens
from diglot.sums import running_sums
from diglot.teachers import gives_rows
from diglot.vocabulary import Vocabulary

T = TypeVar("T")
References = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Side:
    """How one model's hidden states become probabilities."""

    head: Head
    vocabulary: Vocabulary
    stop_ids: Tensor

    @cached_property
    def word_starts(self) -> Tensor:
        """Ids that begin a new word, or end the turn."""
        starts = torch.from_numpy(self.vocabulary.word_starts).to(self.stop_ids.device)
        return torch.cat([starts, self.stop_ids])


class ModelScores:
    """`diglot.objectives.Scores` of two models. Nothing is computed before it is pulled, and nothing twice.

    Args:
        read: the text on both sides.
        hidden_s: `[N_s, H_s]`, hidden states that predict each scored token, with gradient.
        answers: what the teacher says, here or from elsewhere.
        teacher: None for one that gives no hidden states.
        chunk_rows: maps "are single columns all that is read" to how many rows of logits exist at a time.
        temperature: divides the logits inside row and summary objectives.
        stop_as_set: the stop event is the whole stop set, not the very id that was written.
        references: log-probs of the text under the reference student and the reference teacher.
    """

    def __init__(
        self,
        read: AlignedBatch,
        hidden_s: Tensor,
        answers: Answers,
        student: Side,
        teacher: Side | None,
        *,
        chunk_rows: Callable[[bool], int],
        temperature: float = 1.0,
        stop_as_set: bool = True,
        rollout: Rollout | None = None,
        sampler_weight: Tensor | None = None,
        references: References | None = None,
    ) -> None:
        self.read, self.hidden_s, self.answers, self.student, self._teacher = read, hidden_s, answers, student, teacher
        self.chunk_rows, self.temperature, self.stop_as_set = chunk_rows, temperature, stop_as_set
        self.rollout, self.sampler_weight, self._references = rollout, sampler_weight, references
        self._texts: dict[tuple[str, float], Tensor] = {}
        self._reading: TreeReading | None = None  # what the teacher keeps of the text, as long as these scores live

    # ---- the text ----------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.hidden_s.device

    @property
    def written(self) -> Written:
        return self.read.written

    @property
    def alignment(self) -> Alignment[Tensor]:
        return self.read.alignment

    @property
    def on_policy(self) -> bool:
        return self.read.on_policy

    @property
    def path(self) -> Path:
        return Path(self.student_text(self.temperature), self.teacher_text(self.temperature))

    @property
    def text(self) -> Path:
        path = Path(self.student_text(1.0), self.teacher_text(1.0), noncanonical=self.read.noncanonical)
        if self.on_policy and self.read.prompts is not None:
            path = replace(path, prompt=sent(self.read.prompts, self.device))
        if self.rollout is not None:
            old = self.rollout.logp_old if self.temperature == 1 else None
            path = replace(path, logp_old=old, weight=self.rollout.weight)
        return replace(path, sampler_weight=self.sampler_weight)

    def student_text(self, temperature: float) -> Tensor:
        key = ("student", temperature)
        if key not in self._texts:
            self._texts[key] = self._logp(self.hidden_s, self.read.student, self.student, temperature)
        return self._texts[key]

    @torch.no_grad()
    def teacher_text(self, temperature: float) -> Tensor:
        """Log-probs of the teacher's tokens, `[N_t]`, nats, constant."""
        key, served = ("teacher", temperature), self.answers.text_scores
        if key not in self._texts:
            if served is not None:
                check_temperature(temperature, "the log-probs of the text")
                logps = served.text(self.stop_as_set)
            else:
                logps = self._logp(self.hidden_t, self.read.teacher, self.teacher, temperature)
            self._texts[key] = logps.to(self.device)
        return self._texts[key]

    def _logp(self, hidden: Tensor, side: PackedSide, model: Side, temperature: float) -> Tensor:
        stop = side.stop if self.stop_as_set else torch.zeros_like(side.stop)
        rows = self.chunk_rows(False)
        return token_logps(hidden, model.head, side.targets, stop, model.stop_ids, rows, temperature=temperature)

    @cached_property
    def boundaries(self) -> tuple[Tensor, Tensor]:
        of_student = self._mass(self.hidden_s, self.student)
        with torch.no_grad():
            return of_student, self._mass(self.hidden_t, self.teacher).to(self.device)

    def _mass(self, hidden: Tensor, model: Side) -> Tensor:
        ids = model.word_starts.to(hidden.device)

        def mass(logits: Tensor, rows: slice) -> Tensor:
            return logits[:, ids].logsumexp(-1) - logits.logsumexp(-1)

        return summaries(mass, hidden, model.head, self.chunk_rows(False))

    @property
    def reference_texts(self) -> tuple[Tensor, Tensor]:
        if self._references is None:
            raise ConfigError("reference_alpha needs reference models: give reference_teacher_model_name_or_path.")
        return self._references()

    # ---- hidden states -----------------------------------------------------------------------------------------

    @property
    def hidden_t(self) -> Tensor:
        if self._teacher is None:
            raise TeacherError("This teacher gives no hidden states. Choose an objective that needs less of it.")
        return self.answers.hidden

    @property
    def teacher(self) -> Side:
        """How they are read."""
        if self._teacher is None:
            raise TeacherError("This teacher gives no head. Choose an objective that needs less of it.")
        return self._teacher

    @torch.no_grad()
    def teacher_behind(self, tail: TailTokens) -> Tensor:
        if not len(tail.ids):
            return self.hidden_t[:0]
        behind, self._reading = self.answers.branched(tail, self._reading)
        return behind

    @torch.no_grad()
    def teacher_log_probs(self, hidden: Tensor, ids: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        for at, logits in logits_by_parts(hidden, self.teacher.head, self.chunk_rows(False), ids):
            yield at, log_softmax(at_temperature(logits, self.temperature).float())

    def once(self, by: object, make: Callable[[], T]) -> T:
        return self.answers.once(by, make)

    # ---- single entries of rows --------------------------------------------------------------------------------

    @torch.no_grad()
    def teacher_ranges(self, token: Tensor, low: Tensor, high: Tensor) -> Tensor:
        device = self.hidden_t.device
        order = sent(torch.from_numpy(self.teacher.vocabulary.trie.sorted_ids), device)
        rows, place = torch.unique(token.cpu(), return_inverse=True)  # on the host, where sizes are known
        by_row = torch.argsort(place, stable=True)
        bounds = torch.searchsorted(place[by_row], torch.arange(len(rows) + 1)).tolist()
        low, high, of_row = (sent(x.cpu()[by_row], device) for x in (low, high, place))

        def masses(logits: Tensor, block: slice) -> Tensor:
            here = slice(bounds[block.start], bounds[block.start + len(logits)])
            row = of_row[here] - block.start
            # Prefix sums in float64, in place: a range is a difference of two of them.
            sums = running_sums(logits.softmax(-1)[:, order].double(), overwrite=True)
            upper, lower = (sums[row, (b - 1).clamp(min=0)] * (b > 0) for b in (high[here], low[here]))
            return (upper - lower).clamp(min=1e-30).log().to(logits.dtype)

        log_masses = summaries(
            masses, self.hidden_t[sent(rows, device)], self.teacher.head, self.chunk_rows(False), self.temperature
        )
        return log_masses[sent(torch.argsort(by_row), device)].to(self.device)

    @torch.no_grad()
    def teacher_top(self, token: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if (served := self.answers.text_scores) is not None:
            check_temperature(self.temperature, "the likeliest ids")
            at = token.cpu()
            return served.top_ids[at, :k].to(self.device), served.top_logps[at, :k].to(self.device)
        rows = self.hidden_t[token.to(self.hidden_t.device)]
        best = [
            log_softmax(at_temperature(logits, self.temperature)).topk(k, dim=-1)
            for _, logits in logits_by_parts(rows, self.teacher.head, self.chunk_rows(False))
        ]
        return torch.cat([b.indices for b in best]).to(self.device), torch.cat([b.values for b in best]).to(self.device)

    def student_logps(self, token: Tensor, ids: Tensor) -> Tensor:
        return self._row_logps(self.hidden_s, token, ids, self.student)

    @property
    def teacher_gives_rows(self) -> bool:
        return self._teacher is not None

    @torch.no_grad()
    def teacher_logps(self, token: Tensor, ids: Tensor) -> Tensor:
        if self._teacher is None:
            check_temperature(self.temperature, "chosen ids")
            return self.answers.chosen(token, ids).to(self.device)
        return self._row_logps(self.hidden_t, token, ids, self.teacher).to(self.device)

    def _row_logps(self, hidden: Tensor, token: Tensor, ids: Tensor, model: Side) -> Tensor:
        rows, never = hidden[token.to(hidden.device)], torch.zeros_like(ids, dtype=torch.bool)
        return token_logps(rows, model.head, ids, never, model.stop_ids, self.chunk_rows(False), self.temperature)

    # ---- whole rows --------------------------------------------------------------------------------------------

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
        head_t = self.teacher.head if with_teacher else self.student.head
        few = reads_few_columns(compare, self.student.head, head_t)
        return reduce_rows(
            compare,
            self.hidden_s,
            self.student.head,
            self.hidden_t if with_teacher else None,
            head_t,
            rows.student,
            rows.teacher,
            self._weights(rows.student, share),
            self.chunk_rows(few),
            temperature=self.temperature if temperature is None else temperature,
            inputs=inputs,
        )

    def part(self, part: Part, tokens: Tensor, share: float) -> tuple[Tensor, Values]:
        own = self.student.head
        heads = {"student": own, "frozen_student": own.as_frozen(), "teacher": self.teacher.head}
        there = heads[part.left_head].device or part.left.device  # hidden states travel, logits never
        total, values = reduce_rows(
            part.compare,
            part.left.to(there),
            heads[part.left_head],
            part.right,
            heads[part.right_head],
            part.rows_left.to(there),
            part.rows_right,
            self._weights(tokens, share).to(there),
            self.chunk_rows(False),
            temperature=self.temperature,
            inputs={name: value.to(there) for name, value in part.inputs.items()},
        )
        metrics = {name: metric.to(self.device) for name, metric in values.metrics.items()}
        return total.to(self.device), Values(values.loss.to(self.device), metrics)

    def _weights(self, tokens: Tensor, share: float) -> Tensor:
        weight = torch.full((len(tokens),), share, dtype=torch.float64, device=tokens.device)
        known = None if self.rollout is None else self.rollout.weight
        return weight if known is None else weight * known[tokens]

    def summarised_student(self, summary: Summary) -> Tensor:
        return summaries(summary, self.hidden_s, self.student.head, self.chunk_rows(False), self.temperature)

    @torch.no_grad()
    def summarised_teacher(self, summary: Summary) -> Tensor:
        device = self.device

        def here(logits: Tensor, rows: slice) -> Tensor:
            return summary(logits.to(device), rows)

        return summaries(here, self.hidden_t, self.teacher.head, self.chunk_rows(False), self.temperature)

    def stored_distributions(self, segment: Tensor, position: Tensor) -> Tensor | None:
        served = self.answers.text_scores
        if served is None or not hasattr(served, "distributions"):
            return None
        check_temperature(self.temperature, "next-byte distributions")
        return served.distributions(segment, position).to(self.device)


def scores_of(batch: Batch, view: View, hidden: Tensor, head: Head) -> ModelScores:
    """The scores of one view, from the student's hidden states for all of the batch's scored tokens and its head."""
    comparison, read = view.comparison, view.read
    student = Side(head, comparison.reader.student.vocabulary, comparison.pair.stop_s)
    held, teacher = comparison.teacher, None
    if gives_rows(held):
        teacher = Side(held.head, held.renderer.vocabulary, comparison.pair.stop_t)
    weight = batch.sampler_weight
    return ModelScores(
        read,
        view.of_own(hidden),
        view.answers,
        student,
        teacher,
        chunk_rows=comparison.chunk_rows,
        temperature=comparison.temperature,
        stop_as_set=comparison.stop_as_set,
        rollout=view.rollout,
        sampler_weight=None if weight is None else view.of_own(weight),
        references=None if comparison.references is None else lambda: _reference_texts(view),
    )


@torch.no_grad()
def _reference_texts(view: View) -> tuple[Tensor, Tensor]:
    """Log-probs of the text under the student before training and the reference teacher, nats, `[N_s]` and `[N_t]`."""
    comparison, read, logps = view.comparison, view.read, []
    assert comparison.references is not None
    sides = (read.student, comparison.pair.stop_s), (read.teacher, comparison.pair.stop_t)
    for model, (side, stop) in zip(comparison.references, sides, strict=True):
        ends = side.stop if comparison.stop_as_set else torch.zeros_like(side.stop)
        rows = comparison.chunk_rows()
        logps.append(token_logps(model.hidden(side), model.head, side.targets, ends, stop, rows))
    return logps[0], logps[1]


def check_temperature(temperature: float, what: str) -> None:
    """Raise `ConfigError` for a temperature that numbers from elsewhere do not have."""
    if temperature != 1.0:
        raise ConfigError(
            f"kd_temperature={temperature} needs whole rows of the teacher, and a served teacher gives {what} at "
            "temperature 1 only. Leave kd_temperature at 1."
        )
