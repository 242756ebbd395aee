"""Generalised knowledge distillation (GKD, arXiv 2306.13649) for any two tokenizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diglot.batches import AlignedBatch, ReadPair
from diglot.data import Sample
from diglot.errors import ConfigError, TeacherError
from diglot.objectives import OBJECTIVES, Path, PathObjective, RowObjective, make_objective
from diglot.trainers.base import DistillationTrainer, Window
from diglot.trainers.config import GKDConfig


@dataclass(frozen=True)
class Term:
    """One weighted objective of the loss."""

    name: str
    weight: float
    objective: RowObjective | PathObjective

    def count(self, batch: AlignedBatch) -> float:
        """Over how many items of this batch the term is averaged."""
        if isinstance(self.objective, RowObjective):
            return float(self.objective.rows(batch.written).items)
        return float(self.objective.mask(batch.alignment).sum())


class GKDTrainer(DistillationTrainer):
    """The student writes (a share `lmbda` of steps), the teacher judges every row, the student follows.

    On the other steps completions come from the dataset, or from the teacher with `seq_kd`. The divergence is the
    generalised JSD with `beta`, on whole vocabularies if they are equal and on one-to-one rows of shared tokens if not.
    """

    args: GKDConfig
    config_class = GKDConfig

    def _prepare_objectives(self) -> None:
        self.terms = [
            Term(name, weight, make_objective(name, self.pair, **options))
            for name, weight, options in self._requested_objectives()
        ]
        for term in self.terms:
            if term.objective.needs > self.teacher.rung:
                fitting = [n for n, o in OBJECTIVES.items() if o.needs <= self.teacher.rung]
                raise TeacherError(
                    f"Objective {term.name!r} needs {term.objective.needs.name} of the teacher, which offers "
                    f"{self.teacher.rung.name}. These would work: {', '.join(fitting)}."
                )

    def _requested_objectives(self) -> list[tuple[str, float, dict[str, Any]]]:
        requested = self.args.objective
        if isinstance(requested, str):
            requested = [{"name": requested}]
        terms = []
        for one in requested:
            entry = {"name": one} if isinstance(one, str) else dict(one)
            name, weight = entry.pop("name", None), float(entry.pop("weight", 1.0))
            if name is None:
                raise ConfigError(f"objective entry {one!r} has no name. Write {{name: strict, weight: 1.0}}.")
            if name == "auto":
                name = "jsd" if self.same_vocabulary else "strict"
            defaults = {"beta": self.args.beta} if name in ("jsd", "strict") else {}
            defaults |= {"top_k": self.args.strict_top_k} if name == "strict" else {}
            terms.append((name, weight, {**defaults, **entry}))
        return terms

    # ---- the window --------------------------------------------------------------------------------------------

    def prepare_window(self, window: Window) -> list[AlignedBatch]:
        on_policy = self.draw("lmbda") < self.args.lmbda
        if on_policy:
            pairs = self.write_completions(window)
        elif self.args.seq_kd:
            pairs = self.teacher_completions(window)
        else:
            pairs = [[self.reader.written(sample) for sample in batch] for batch in window]
        batches = [self.align(batch, on_policy) for batch in pairs]
        counts = self.count_over_ranks({t.name: sum(map(t.count, batches)) for t in self.terms})
        for batch in batches:
            batch.counts = counts
        return batches

    def teacher_completions(self, window: Window) -> list[list[ReadPair | None]]:
        """The teacher writes in its own ids and template; both sides then read its text."""
        renderer = self.teacher.renderer
        samples = [sample for batch in window for sample in batch]
        prompts = [renderer.prompt_ids(c, thinking=self.opens_thinking(c)) for c in (s.conversation for s in samples)]
        completions = self.sampler_for(renderer)(
            self.teacher.model,
            prompts,
            max_new_tokens=self.args.max_completion_length,
            seed=self.seed_for("seq_kd", per_rank=True),
        )
        pairs = iter(map(self._teacher_wrote, samples, completions))
        return [[next(pairs) for _ in batch] for batch in window]

    def _teacher_wrote(self, sample: Sample, completion: Any) -> ReadPair | None:
        inside = self.opens_thinking(sample.conversation)
        written = self.teacher.renderer.from_sampled(sample.conversation, completion, thinking=inside)
        reply = written.segment_bytes[-1].decode("utf-8")
        return self.reader.written(Sample(sample.conversation, reply, sample.where), stopped=written.stopped[-1])

    # ---- the loss ----------------------------------------------------------------------------------------------

    def batch_loss(self, model: torch.nn.Module, batch: AlignedBatch) -> Tensor:
        assert batch.counts is not None
        hidden_s, hidden_t = self.hidden_at_rows(model, batch.student), self.teacher_hidden(batch)
        loss = hidden_s.sum() * 0.0
        for term in self.terms:
            share = term.weight * self.accelerator.num_processes / max(batch.counts[term.name], 1.0)
            loss = loss + self._term_loss(term, share, hidden_s, hidden_t, batch)
        return loss

    def _term_loss(self, term: Term, share: float, hidden_s: Tensor, hidden_t: Tensor, batch: AlignedBatch) -> Tensor:
        if isinstance(term.objective, RowObjective):
            loss, rows = self.row_loss(term.objective, share, hidden_s, hidden_t, batch)
            metrics = {"loss": rows.loss, **rows.metrics}
        else:
            logp_s, logp_t = (
                self.logps(hidden_s, batch.student, "student"),
                self.logps(hidden_t, batch.teacher, "teacher"),
            )
            path = Path(logp_s, logp_t.detach())
            values, mask = term.objective(path, batch.alignment)
            loss, metrics = share * values.loss[mask].sum(), {k: v[mask] for k, v in values.metrics.items()}
        self._log_metrics(term.name, metrics)
        return loss

    def _log_metrics(self, name: str, metrics: Mapping[str, Tensor]) -> None:
        for metric, values in metrics.items():
            measured = values[~values.isnan()]
            self._metrics.add_mean(f"{name}/{metric}", float(measured.sum()), len(measured))
