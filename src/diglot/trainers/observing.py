"""A few completions under the eye: scored by both models apart from training, for the log, the table and the report.

Every rank runs the same number of passes, since a sharded model needs all of them; the main process writes. Nothing
here draws from the run's random numbers or touches its gradients, so a run with and without it is the same run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset

from diglot.batches import AlignedBatch, ReadPair
from diglot.data import Sample, to_sample
from diglot.evaluation.reports import OnPolicyReport
from diglot.evaluation.rollouts import Rollout, rollouts_of
from diglot.evaluation.rows import RowFacts, compare, row_facts
from diglot.evaluation.texts import repetition
from diglot.objectives.levels import Level
from diglot.rendering import Role
from diglot.report.completions import CompletionRow, print_completions
from diglot.report.records import METRICS, ROLLOUTS, append
from diglot.teachers import local
from diglot.trainers.lengths import in_order_of_data

if TYPE_CHECKING:
    from diglot.trainers.base import DistillationTrainer

ALTERNATIVES = 3  # likeliest tokens of either side that are kept for each chunk of the prompts before and after
FIXED_PROMPTS = 16  # prompts that are answered before the first step and after the last one


class Observer:
    """Observes the completions of `trainer`."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer

    # ---- during the run ----------------------------------------------------------------------------------------

    def window(self, batches: Sequence[AlignedBatch]) -> None:
        """Look at a window's first completions, if this step is logged or its completions are to be printed."""
        trainer, args, step = self.trainer, self.trainer.args, self.trainer.state.global_step
        trainer._metrics.add(_repetition(batches))
        logged = self._is_logged(step) and self._can_score()
        printed = args.log_completions and step % args.log_completions_steps == 0
        count = max(logged * args.log_rollouts, printed * args.num_completions_to_print)
        if not count:
            return
        pairs = in_order_of_data(batches)[:count]
        if not self._can_score():
            return self._print([self._unscored(pair) for pair in pairs[: args.num_completions_to_print]], step)
        batch, facts = self._score(pairs, batches[0].on_policy, top=0)
        found = self._rollouts(batch, facts)
        if logged:
            self._add_means(batch, facts)
            self._write(found[: args.log_rollouts], "training", step)
        if printed:
            self._print(_rows(found[: args.num_completions_to_print]), step)

    def _is_logged(self, step: int) -> bool:
        """Will the step that comes now be logged?"""
        args, every = self.trainer.args, self.trainer.state.logging_steps
        if not args.log_rollouts or args.logging_strategy != "steps":
            return False
        return bool((every and (step + 1) % every == 0) or (step == 0 and args.logging_first_step))

    def _can_score(self) -> bool:
        """Only a teacher that gives hidden states can be asked about any row."""
        return self.trainer.teacher.level >= Level.HIDDEN

    def _add_means(self, batch: AlignedBatch, facts: tuple[RowFacts, RowFacts]) -> None:
        """Metrics of the observed completions; the names are the same on all ranks."""
        columns = {name: float(values.sum()) for name, values in compare(batch, *facts).items()}
        add = self.trainer._metrics.add_mean
        if batch.on_policy:
            add("rollouts/kl_nats_per_byte", columns["gap"], columns["num_bytes"])
        add("rollouts/stop_agreement", columns["stop_common"], columns["stop_either"])
        markup = torch.from_numpy(np.isin(batch.teacher.role, [Role.STOP, Role.MARKUP]))
        add("rollouts/teacher_markup_surprisal", -float(facts[1].logp[markup].sum()), float(markup.sum()))

    # ---- before the first step and after the last -------------------------------------------------------------

    def fixed(self, phase: str) -> None:
        """The student answers the same few prompts with the same seed; one line of metrics, and rollouts."""
        trainer, step = self.trainer, self.trainer.state.global_step
        samples = self._fixed_samples() if trainer.args.log_rollouts and self._can_score() else []
        if not samples:
            return
        evaluator, longest = trainer.evaluator(), trainer.args.max_completion_length
        pairs = evaluator.write([s.conversation for s in samples], trainer.sampler, longest, trainer.args.seed)
        batch, facts = self._score(pairs, on_policy=True, top=ALTERNATIVES)
        written = OnPolicyReport(**compare(batch, *facts))  # type: ignore[arg-type]
        replies = [sample for sample in samples if sample.reply is not None]
        reference = evaluator.on_reference(replies) if replies else None
        trainer.reader.take_dropped()
        if not trainer.is_world_process_zero():
            return
        numbers = {
            "fixed/kl_nats_per_byte": written.reverse_kl_nats_per_byte,
            "fixed/kl_error": written.reverse_kl_error,
            "fixed/stop_agreement": written.stop_agreement,
            "fixed/coverage": written.coverage,
            "fixed/mean_bytes": float(written.num_bytes.mean()) if pairs else float("nan"),
        }
        if reference is not None:
            numbers["fixed/bits_per_byte"] = reference.bits_per_byte
        append(self._folder / METRICS, {"step": step, "phase": phase, **numbers})
        self._write(self._rollouts(batch, facts)[: trainer.args.log_rollouts], phase, step)

    def _fixed_samples(self) -> list[Sample]:
        """The first rows of the evaluation data, else of the training data; none of what is streamed."""
        data: Any = self.trainer.eval_dataset or self.trainer.train_dataset
        if isinstance(data, dict):
            data = next(iter(data.values()))
        if not isinstance(data, Dataset):
            return []
        rows: Iterable[Any] = itertools.islice(data, FIXED_PROMPTS)
        return [to_sample(row, where=f"row {i}") for i, row in enumerate(rows)]

    # ---- what both share ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def _score(
        self, pairs: Sequence[ReadPair], on_policy: bool, top: int
    ) -> tuple[AlignedBatch, tuple[RowFacts, RowFacts]]:
        """Both models read the pairs, in evaluation mode; every model is left in the mode it was in."""
        trainer = self.trainer
        batch, model = trainer.align(pairs, on_policy), trainer.model
        assert model is not None
        training = model.training
        model.eval()
        try:
            with trainer.accelerator.autocast():
                hidden_s = trainer.hidden_at_rows(model, batch.student)
                teacher = local(trainer.teacher, "A record of completions")
                hidden_t = teacher.hidden(batch.teacher)
        finally:
            model.train(training)
        rows = trainer.chunk_rows()
        student = row_facts(hidden_s, batch.student, trainer.student_head, trainer.pair.stop_s, rows, top)
        return batch, (
            student,
            row_facts(hidden_t, batch.teacher, teacher.head, trainer.pair.stop_t, rows, top),
        )

    def _rollouts(self, batch: AlignedBatch, facts: tuple[RowFacts, RowFacts]) -> list[Rollout]:
        trainer = self.trainer
        tables = trainer.student_renderer.vocabulary, trainer.teacher.renderer.vocabulary
        return rollouts_of(batch, [self._prompt(pair) for pair in batch.pairs], facts, tables)

    def _prompt(self, pair: ReadPair) -> str:
        return str(self.trainer.student_renderer.tokenizer.decode(pair.student.ids[: pair.prompt_length]))

    def _unscored(self, pair: ReadPair) -> CompletionRow:
        decode = self.trainer.student_renderer.tokenizer.decode
        return CompletionRow(self._prompt(pair), str(decode(pair.student.ids[pair.prompt_length :])))

    def _write(self, found: Sequence[Rollout], phase: str, step: int) -> None:
        if self.trainer.is_world_process_zero():
            for place, rollout in enumerate(found):
                where = {"step": step, "phase": phase, "place": place}
                append(self._folder / ROLLOUTS, {**where, **rollout.as_json()})

    def _print(self, rows: Sequence[CompletionRow], step: int) -> None:
        if self.trainer.is_world_process_zero():
            print_completions(rows, step)

    @property
    def _folder(self) -> Path:
        return Path(str(self.trainer.args.output_dir))


def _rows(found: Sequence[Rollout]) -> list[CompletionRow]:
    rows = []
    for one in found:
        chunks = [(c.text, c.logp_t - c.logp_s if c.comparable else None) for c in one.chunks]
        rows.append(CompletionRow(one.prompt, one.completion, one.gap, chunks))
    return rows


def _repetition(batches: Sequence[AlignedBatch]) -> dict[str, float]:
    counts = [repetition(p.student.segment_bytes[-1].decode("utf-8", "replace")) for b in batches for p in b.pairs]
    return {"repeated": float(sum(n for n, _ in counts)), "repeatable": float(sum(n for _, n in counts))}
