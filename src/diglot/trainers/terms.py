"""The loss as a weighted list of objectives, and what each of them is told about a batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diglot.batches import AlignedBatch, PackedSide
from diglot.errors import ConfigError, TeacherError
from diglot.heads import Head, logits_by_parts, reads_few_columns, reduce_rows, summaries, token_logps
from diglot.objectives import (
    OBJECTIVES,
    Level,
    Objective,
    Pair,
    Part,
    Path,
    PathObjective,
    ProjectedObjective,
    RowObjective,
    Rows,
    SummaryObjective,
    Values,
    make_objective,
)
from diglot.vocabulary import Vocabulary

AddMean = Callable[[str, float, float], None]


@dataclass(frozen=True)
class Term:
    """One weighted objective of the loss."""

    name: str
    weight: float
    objective: Objective

    def plan(self, batch: AlignedBatch) -> Any:
        """What the text alone says about the term: rows, a plan of summaries, or a mask. Found once per batch."""
        if self.name not in batch.plans:
            objective = self.objective
            if isinstance(objective, PathObjective):
                batch.plans[self.name] = objective.mask(batch.alignment)
            elif isinstance(objective, SummaryObjective):
                batch.plans[self.name] = objective.plan(batch.written)
            else:
                batch.plans[self.name] = objective.rows(batch.written)
        return batch.plans[self.name]

    def count(self, batch: AlignedBatch) -> float:
        """Over how many items of this batch the term is averaged."""
        plan = self.plan(batch)
        return float(plan.sum() if isinstance(plan, Tensor) else plan.items)


def terms_of(requested: str | Sequence[Any], pair: Pair, defaults: Mapping[str, Mapping[str, Any]]) -> list[Term]:
    """Terms for what `objective` asks for: a name, or a list of names and `{name, weight, options}`.

    `defaults` are options of single objectives, where the request does not give them.
    """
    terms: list[Term] = []
    for one in [requested] if isinstance(requested, str) else requested:
        entry = {"name": one} if isinstance(one, str) else dict(one)
        name, weight = entry.pop("name", None), float(entry.pop("weight", 1.0))
        if name is None:
            raise ConfigError(f"objective entry {one!r} has no name. Write {{name: strict, weight: 1.0}}.")
        options = {**defaults.get(name, {}), **entry}
        taken = sum(term.name.split("#")[0] == name for term in terms)
        terms.append(Term(f"{name}#{taken + 1}" if taken else name, weight, make_objective(name, pair, **options)))
    if not terms:
        raise ConfigError("objective is an empty list: there would be no loss. Name at least one objective.")
    return terms


def check_level(terms: Sequence[Term], offered: Level, also: Collection[str] = ()) -> None:
    """Raise `TeacherError` for a term that needs more of the teacher than it offers; `also` are served all the same."""
    for term in terms:
        needed = needs_of(term.objective)
        if needed > offered and term.objective.name not in also:
            fitting = [name for name, objective in OBJECTIVES.items() if objective.needs <= offered or name in also]
            raise TeacherError(
                f"Objective {term.name!r} needs {needed.name} of the teacher, which offers "
                f"{offered.name}. These would work: {', '.join(fitting)}."
            )


def needs_of(objective: Objective) -> Level:
    """What an objective needs of the teacher with its options: boundary masses take whole rows."""
    if isinstance(objective, PathObjective) and objective.reads_boundaries:
        return max(objective.needs, Level.HIDDEN)
    return objective.needs


@dataclass(frozen=True)
class Reader:
    """How one model's hidden states become probabilities."""

    head: Head
    stop_ids: Tensor
    word_starts: Tensor  # ids that begin a new word, or end the turn
    vocabulary: Vocabulary

    @classmethod
    def of(cls, head: Head, vocabulary: Vocabulary, stop_ids: Tensor) -> Reader:
        """From a model's head, its table and its stop set."""
        starts = torch.from_numpy(vocabulary.word_starts).to(stop_ids.device)
        return cls(head, stop_ids, torch.cat([starts, stop_ids]), vocabulary)


class BatchScores:
    """What both models say about one batch. Nothing is computed before it is asked for, and nothing twice.

    Args:
        hidden_s: `[N_s, H_s]`, hidden states that predict each scored token, with gradient.
        hidden_t: `[N_t, H_t]`.
        chunk_rows: maps "are single columns all that is read" to how many rows of logits exist at a time.
        temperature: divides the logits inside row and summary objectives.
        stop_as_set: the stop event is the whole stop set, not the very id that was written.
        references: log-probs of the text under the reference student and the reference teacher.
    """

    def __init__(
        self,
        batch: AlignedBatch,
        hidden_s: Tensor,
        hidden_t: Tensor | None,
        student: Reader,
        teacher: Reader | None,
        *,
        chunk_rows: Callable[[bool], int],
        temperature: float,
        stop_as_set: bool,
        references: Callable[[AlignedBatch], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.batch, self.hidden_s, self.student = batch, hidden_s, student
        self._hidden_t, self._teacher = hidden_t, teacher
        self.chunk_rows, self.temperature, self.stop_as_set = chunk_rows, temperature, stop_as_set
        self.references = references
        self._logps: dict[float, tuple[Tensor, Tensor]] = {}

    @property
    def hidden_t(self) -> Tensor:
        """The teacher's hidden states; a `TeacherError` if it gives none, which `check_level` finds out before."""
        if self._hidden_t is None:
            raise TeacherError("This teacher gives no hidden states. Choose an objective that needs less of it.")
        return self._hidden_t

    @property
    def teacher(self) -> Reader:
        """How they are read."""
        if self._teacher is None:
            raise TeacherError("This teacher gives no head. Choose an objective that needs less of it.")
        return self._teacher

    def logps(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probs of the text, `[N_s]` with gradient and `[N_t]` without."""
        if temperature not in self._logps:
            logp_s = self._logp(self.hidden_s, self.batch.student, self.student, temperature)
            with torch.no_grad():
                logp_t = self._teacher_text(temperature)
            self._logps[temperature] = logp_s, logp_t.to(logp_s.device)
        return self._logps[temperature]

    def _teacher_text(self, temperature: float) -> Tensor:
        return self._logp(self.hidden_t, self.batch.teacher, self.teacher, temperature)

    def _logp(self, hidden: Tensor, side: PackedSide, reader: Reader, temperature: float) -> Tensor:
        stop = side.stop if self.stop_as_set else torch.zeros_like(side.stop)
        return token_logps(
            hidden, reader.head, side.targets, stop, reader.stop_ids, self.chunk_rows(False), temperature=temperature
        )

    @property
    def path(self) -> Path:
        """The log-probs at the temperature of the divergence, for objectives of rows."""
        return Path(*self.logps(self.temperature))

    def path_for(self, objective: PathObjective) -> Path:
        """The log-probs of the models themselves, and what else the objective reads."""
        batch = self.batch
        path = Path(*self.logps(1.0), weight=batch.weight, noncanonical=batch.noncanonical)
        path = replace(path, sampler_weight=batch.sampler_weight)
        if objective.reads_boundaries:
            boundary_s, boundary_t = self.boundaries
            path = replace(path, boundary_s=boundary_s, boundary_t=boundary_t)
        if objective.reads_references:
            if self.references is None:
                raise ConfigError("reference_alpha needs reference models: give reference_teacher_model_name_or_path.")
            reference_s, reference_t = self.references(self.batch)
            path = replace(path, logp_reference_s=reference_s, logp_reference_t=reference_t)
        return path

    @cached_property
    def boundaries(self) -> tuple[Tensor, Tensor]:
        """Log mass of "a new word begins, or the turn ends" in the row of each token, `[N_s]` and `[N_t]`."""
        of_student = self._mass(self.hidden_s, self.student)
        with torch.no_grad():
            return of_student, self._mass(self.hidden_t, self.teacher).to(of_student.device)

    def _mass(self, hidden: Tensor, reader: Reader) -> Tensor:
        ids = reader.word_starts.to(hidden.device)

        def mass(logits: Tensor, rows: slice) -> Tensor:
            return logits[:, ids].logsumexp(-1) - logits.logsumexp(-1)

        return summaries(mass, hidden, reader.head, self.chunk_rows(False))

    @torch.no_grad()
    def teacher_ranges(self, token: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Log of the teacher's mass on ranges of its sorted tokens, in the rows that predict `token`, `[Q]`."""
        device = self.hidden_t.device
        order = torch.from_numpy(self.teacher.vocabulary.trie.sorted_ids).to(device)
        rows, place = torch.unique(token.to(device), return_inverse=True)
        by_row = torch.argsort(place, stable=True)
        bounds = torch.searchsorted(place[by_row], torch.arange(len(rows) + 1, device=device))
        low, high = low.to(device)[by_row], high.to(device)[by_row]

        def masses(logits: Tensor, block: slice) -> Tensor:
            asked = slice(int(bounds[block.start]), int(bounds[block.start + len(logits)]))
            row = place[by_row[asked]] - block.start
            # Prefix sums in float64, in place: a range is a difference of two of them.
            sums = logits.softmax(-1)[:, order].double().cumsum_(-1)
            upper, lower = (sums[row, (b - 1).clamp(min=0)] * (b > 0) for b in (high[asked], low[asked]))
            found = upper - lower
            return found.clamp(min=1e-30).log().to(logits.dtype)

        found = summaries(masses, self.hidden_t[rows], self.teacher.head, self.chunk_rows(False), self.temperature)
        return found[torch.argsort(by_row)].to(self.hidden_s.device)

    @torch.no_grad()
    def teacher_top(self, token: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The teacher's likeliest `k` ids in the rows that predict `token` and their log-probs, `[Q, k]`, constant."""
        rows = self.hidden_t[token.to(self.hidden_t.device)]
        best = []
        for _, logits in logits_by_parts(rows, self.teacher.head, self.chunk_rows(False)):
            best.append((logits / self.temperature).log_softmax(-1).topk(k, dim=-1))
        device = self.hidden_s.device
        return torch.cat([b.indices for b in best]).to(device), torch.cat([b.values for b in best]).to(device)

    def student_logps(self, token: Tensor, ids: Tensor) -> Tensor:
        """Log-probs of `ids` in the student's rows that predict `token`, `[Q]`; carries gradient."""
        return self._row_logps(self.hidden_s, token, ids, self.student)

    @torch.no_grad()
    def teacher_logps(self, token: Tensor, ids: Tensor) -> Tensor:
        """The same of the teacher, constant."""
        return self._row_logps(self.hidden_t, token, ids, self.teacher).to(self.hidden_s.device)

    def _row_logps(self, hidden: Tensor, token: Tensor, ids: Tensor, reader: Reader) -> Tensor:
        rows, never = hidden[token.to(hidden.device)], torch.zeros_like(ids, dtype=torch.bool)
        return token_logps(rows, reader.head, ids, never, reader.stop_ids, self.chunk_rows(False), self.temperature)

    # ---- terms -------------------------------------------------------------------------------------------------

    def loss(self, term: Term, share: float, add_mean: AddMean) -> Tensor:
        """`share` times the sum of the term's values, and its metrics."""
        values, loss = self._values(term, share)
        if term.objective.balanced_with_ce:
            rows = term.plan(self.batch).student.to(self.hidden_s.device)
            loss = balanced(loss, share * -self.logps(1.0)[0][rows].sum())
        for metric, found in {"loss": values.loss, **values.metrics}.items():
            measured = found.detach()[~found.isnan()]
            add_mean(f"{term.name}/{metric}", float(measured.sum()), len(measured))
        return loss

    def _values(self, term: Term, share: float) -> tuple[Values, Tensor]:
        objective = term.objective
        if isinstance(objective, PathObjective):
            values, mask = objective(self.path_for(objective), self.batch.alignment)
            kept = Values(values.loss[mask], {name: value[mask] for name, value in values.metrics.items()})
            return kept, share * kept.loss.sum()
        if isinstance(objective, SummaryObjective):
            values = self._summarised(objective, term.plan(self.batch).to(self.hidden_s.device))
            return values, share * values.loss.sum()
        rows = term.plan(self.batch).to(self.hidden_s.device)
        if isinstance(objective, ProjectedObjective):
            return self._projected(objective, rows, share)
        return self._by_rows(objective, rows, share)

    def _by_rows(self, objective: RowObjective, rows: Rows, share: float) -> tuple[Values, Tensor]:
        given = {**rows.given, **objective.extra(rows, self.batch.written, self)}
        whole = objective.needs > Level.TOP_K  # else what it reads of the teacher is among `given`
        head_t = self.teacher.head if whole else self.student.head
        few = reads_few_columns(objective, self.student.head, head_t)
        loss, values = reduce_rows(
            objective,
            self.hidden_s,
            self.student.head,
            self.hidden_t if whole else None,
            head_t,
            rows.student,
            rows.teacher,
            self._weights(rows.student, share),
            self.chunk_rows(few),
            temperature=self.temperature,
            given=given,
        )
        # One entry for each item: the logged mean is the share in the window, however that was split.
        skipped = {
            f"skipped_{why}": torch.cat([torch.ones(n), torch.zeros(rows.items)]) for why, n in rows.skipped.items()
        }
        return Values(values.loss, {**values.metrics, **skipped}), loss

    def _weights(self, rows: Tensor, share: float) -> Tensor:
        weight = torch.full((len(rows),), share, dtype=torch.float64, device=rows.device)
        return weight if self.batch.weight is None else weight * self.batch.weight[rows]

    def _summarised(self, objective: SummaryObjective, plan: Any) -> Values:
        of_student = self.summarised_student(objective, plan)
        return objective(of_student, self.summarised_teacher(objective, plan), plan)

    def summarised_student(self, objective: SummaryObjective, plan: Any) -> Tensor:
        """The summary of the student's rows, with gradient."""
        rows, temperature = self.chunk_rows(False), self.temperature
        return summaries(objective.summary_s(plan), self.hidden_s, self.student.head, rows, temperature)

    @torch.no_grad()
    def summarised_teacher(self, objective: SummaryObjective, plan: Any) -> Tensor:
        """The same of the teacher's, constant. Its logits come to the student's device a block at a time."""
        summary, device = objective.summary_t(plan), self.hidden_s.device

        def here(logits: Tensor, rows: slice) -> Tensor:
            return summary(logits.to(device), rows)

        return summaries(here, self.hidden_t, self.teacher.head, self.chunk_rows(False), self.temperature)

    def _projected(self, objective: ProjectedObjective, rows: Rows, share: float) -> tuple[Values, Tensor]:
        metrics: dict[str, Tensor] = {}
        total, loss = self.hidden_s.new_zeros(()), self.hidden_s.new_zeros(len(rows.student))
        for part in objective.parts(rows, self.hidden_s, self.hidden_t):
            of_part, values = self._part(part, self._weights(rows.student, share))
            total = total + of_part
            metrics |= {part.name: values.loss, **values.metrics}
            loss = loss + values.loss
        return Values(loss, metrics), total

    def _part(self, part: Part, weight: Tensor) -> tuple[Tensor, Values]:
        heads = {
            "student": self.student.head,
            "frozen_student": self.student.head.as_frozen(),
            "teacher": self.teacher.head,
        }
        return reduce_rows(
            part.compare,
            part.left,
            heads[part.left_head],
            part.right,
            heads[part.right_head],
            part.rows_left,
            part.rows_right,
            weight,
            self.chunk_rows(False),
            temperature=self.temperature,
            given=part.given,
        )


def balanced(loss: Tensor, cross_entropy: Tensor) -> Tensor:
    """`constant(cross_entropy / loss) * loss + cross_entropy`: both parts weigh the same (X-Token, section 3.4)."""
    factor = (cross_entropy / loss.clamp(min=1e-8)).detach()
    return factor * loss + cross_entropy
