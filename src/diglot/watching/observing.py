"""A few completions under the eye: scored by both models apart from training, for the log, the table and the report.

Every rank runs the same number of passes, since a sharded model needs all of them; the main process writes. Nothing
here draws from the run's random numbers or touches its gradients, so a run with and without it is the same run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from diglot.batches import AlignedBatch, ReadPair, text_sums
from diglot.comparisons import Batch, Comparison
from diglot.data import Sample, to_sample
from diglot.evaluation import Evaluator
from diglot.evaluation.reports import OnPolicyReport
from diglot.evaluation.rollouts import Rollout, rollouts_of
from diglot.evaluation.rows import RowFacts, compare, row_facts
from diglot.evaluation.texts import repetition
from diglot.heads import Head, evaluating, hidden_at_rows
from diglot.objectives import Level
from diglot.options import DistillationConfig
from diglot.rendering import Role
from diglot.report.completions import CompletionRow, print_completions
from diglot.report.records import METRICS, ROLLOUTS, append
from diglot.teachers import whole_rows
from diglot.watching.drift import Drift, fixed_texts, is_due, text_sums_of
from diglot.watching.metrics import StepMetrics

ALTERNATIVES = 3  # likeliest tokens of either side that are kept for each chunk of the prompts before and after
FIXED_PROMPTS = 16  # prompts that are answered before the first step and after the last one


class Observer:
    """Observes completions, as the student and one teacher see them."""

    def __init__(
        self,
        args: DistillationConfig,
        comparisons: Sequence[Comparison],
        head: Head,
        metrics: StepMetrics,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.args, self.head, self.metrics, self.autocast = args, head, metrics, autocast
        # Only a teacher that gives hidden states can be asked about any row.
        whole = [k for k, one in enumerate(comparisons) if one.teacher.level >= Level.HIDDEN]
        self._number, self.can_score = (whole[0], True) if whole else (0, False)
        self.comparison = comparisons[self._number]
        self.drift = Drift()
        self._texts: list[Sample] | None = None
        # Is what it writes its distribution, and that of now?
        self.own_draws = args.temperature == args.top_p == 1 and not args.top_k and not args.rollout_ahead
        self._is_main, self._folder = args.process_index == 0, Path(str(args.output_dir))

    # ---- during the run ----------------------------------------------------------------------------------------

    def window(self, batches: Sequence[Batch], model: nn.Module, step: int, logging_steps: float) -> None:
        """Look at a window's first completions, if this step is logged or its completions are to be printed."""
        args = self.args
        self.metrics.add(_repetition(batches))
        self.metrics.add(text_sums_of(batches))
        logged = self._is_logged(step, logging_steps) and self.can_score
        printed = args.log_completions and step % args.log_completions_steps == 0
        count = max(logged * args.log_rollouts, printed * args.num_completions_to_print)
        if not count:
            return
        pairs = in_order_of_data(batches, self._number)[:count]
        if not self.can_score:
            return self._print([self._unscored(pair) for pair in pairs[: args.num_completions_to_print]], step)
        batch, facts = self._score(model, pairs, batches[0].on_policy, top=0)
        rollouts = self._rollouts(batch, facts)
        if logged:
            self._add_means(batch, facts)
            self._write(rollouts[: args.log_rollouts], "training", step)
        if printed:
            self._print(_rows(rollouts[: args.num_completions_to_print]), step)

    def drifts(self, batches: Sequence[Batch], step: int, every: float, data: Any, evaluator: Evaluator) -> None:
        """Note how the student writes at this step, and now and then how likely some fixed texts are to it."""
        bits = None
        if self.args.log_rollouts and is_due(step, self._is_logged(step, every)):
            if self._texts is None:
                self._texts = fixed_texts(fixed_samples(data))
            report = evaluator.on_reference(self._texts)
            self.comparison.reader.take_dropped()
            bits = report.bits_per_byte
            self.metrics.add_mean(
                "watched/bits_per_byte", float(report.nats.sum()) / math.log(2), report.num_bytes.sum()
            )
        if batches[0].on_policy:
            sums: dict[str, float] = {**text_sums([p for b in batches for p in b.pairs], True), **text_sums_of(batches)}
            stats = [b.views[self._number].read.stats for b in batches]
            sums |= {name: sum(one[name] for one in stats) for name in ("one_to_one", "tokens")}
            sums["scored"] = sum(batch.scored for batch in batches)
            self.drift.add(step, sums, bits)

    def _is_logged(self, step: int, every: float) -> bool:
        """Will the step that comes now be logged?"""
        args = self.args
        if not args.log_rollouts or args.logging_strategy != "steps":
            return False
        return bool((every and (step + 1) % every == 0) or (step == 0 and args.logging_first_step))

    def _add_means(self, batch: AlignedBatch, facts: tuple[RowFacts, RowFacts]) -> None:
        """Metrics of the observed completions; the names are the same on all ranks."""
        columns = {name: float(values.sum()) for name, values in compare(batch, *facts).items()}
        add = self.metrics.add_mean
        if batch.on_policy:
            name = "kl_nats_per_byte" if self.own_draws else "log_ratio_nats_per_byte"
            add(f"rollouts/{name}", columns["gap"], columns["num_bytes"])
        add("rollouts/stop_agreement", columns["stop_common"], columns["stop_either"])
        markup = torch.from_numpy(np.isin(batch.teacher.role, [Role.STOP, Role.MARKUP]))
        add("rollouts/teacher_markup_surprisal", -float(facts[1].logp[markup].sum()), float(markup.sum()))

    # ---- before the first step and after the last -------------------------------------------------------------

    def fixed(self, phase: str, step: int, model: nn.Module, data: Any, evaluator: Evaluator, sampler: Any) -> None:
        """The student answers the same few prompts of `data` with the same seed; a line of metrics, and rollouts."""
        args = self.args
        samples = fixed_samples(data) if args.log_rollouts and self.can_score else []
        if not samples:
            return
        conversations = [s.conversation for s in samples]
        pairs = evaluator.write(conversations, sampler, args.max_completion_length, args.seed)
        batch, facts = self._score(model, pairs, on_policy=True, top=ALTERNATIVES)
        written = OnPolicyReport(**compare(batch, *facts))  # type: ignore[arg-type]
        replies = [sample for sample in samples if sample.reply is not None]
        reference = evaluator.on_reference(replies) if replies else None
        self.comparison.reader.take_dropped()
        if not self._is_main:
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
            numbers["fixed/bits_per_byte_error"] = reference.bits_per_byte_error
        append(self._folder / METRICS, {"step": step, "phase": phase, **numbers})
        self._write(self._rollouts(batch, facts)[: args.log_rollouts], phase, step)

    # ---- what both share ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def _score(
        self, model: nn.Module, pairs: Sequence[ReadPair], on_policy: bool, top: int
    ) -> tuple[AlignedBatch, tuple[RowFacts, RowFacts]]:
        """Both models read the pairs, in evaluation mode; every model is left in the mode it was in."""
        comparison, stops = self.comparison, (self.comparison.pair.stop_s, self.comparison.pair.stop_t)
        batch, teacher = comparison.align(pairs, on_policy), whole_rows(comparison.teacher, "A record of completions")
        side, rows = batch.student, comparison.chunk_rows()
        with evaluating(model), self.autocast():
            hidden_s = hidden_at_rows(
                model, side.input_ids, side.attention_mask, side.rows, (side.host_ids, side.host_rows)
            )
            hidden_t = teacher.hidden(batch.teacher)
        student = row_facts(hidden_s, side, self.head, stops[0], rows, top)
        return batch, (student, row_facts(hidden_t, batch.teacher, teacher.head, stops[1], rows, top))

    def _rollouts(self, batch: AlignedBatch, facts: tuple[RowFacts, RowFacts]) -> list[Rollout]:
        tables = self.comparison.reader.student.vocabulary, self.comparison.teacher.renderer.vocabulary
        return rollouts_of(batch, [self._prompt(pair) for pair in batch.pairs], facts, tables)

    def _prompt(self, pair: ReadPair) -> str:
        return str(self.comparison.reader.student.tokenizer.decode(pair.student.ids[: pair.student.prompt_length]))

    def _unscored(self, pair: ReadPair) -> CompletionRow:
        decode = self.comparison.reader.student.tokenizer.decode
        return CompletionRow(self._prompt(pair), str(decode(pair.student.ids[pair.student.prompt_length :])))

    def _write(self, rollouts: Sequence[Rollout], phase: str, step: int) -> None:
        if self._is_main:
            for place, rollout in enumerate(rollouts):
                where = {"step": step, "phase": phase, "place": place}
                append(self._folder / ROLLOUTS, {**where, **rollout.as_json()})

    def _print(self, rows: Sequence[CompletionRow], step: int) -> None:
        if self._is_main:
            print_completions(rows, step)


def fixed_samples(data: Any) -> list[Sample]:
    """The first rows of a dataset; none of what is streamed."""
    if isinstance(data, dict):
        data = next(iter(data.values()))
    if not isinstance(data, Dataset):
        return []
    rows: Iterable[Any] = itertools.islice(data, FIXED_PROMPTS)
    return [to_sample(row, where=f"row {i}") for i, row in enumerate(rows)]


def in_order_of_data(batches: Sequence[Batch], view: int = 0) -> list[ReadPair]:
    """The pairs of a window in the order of the data, as one comparison reads them."""
    placed = []
    for batch in batches:
        own = batch.views[view]
        texts = range(len(batch.places)) if own.texts is None else own.texts
        placed += [(batch.places[i], pair) for i, pair in zip(texts, own.read.pairs, strict=True)]
    return [pair for _, pair in sorted(placed, key=lambda both: both[0])]


def _rows(rollouts: Sequence[Rollout]) -> list[CompletionRow]:
    rows = []
    for one in rollouts:
        chunks = [(c.text, c.logp_t - c.logp_s if c.comparable else None) for c in one.chunks]
        rows.append(CompletionRow(one.prompt, one.completion, one.gap, chunks))
    return rows


def _repetition(batches: Sequence[Batch]) -> dict[str, float]:
    counts = [repetition(p.student.segment_bytes[-1].decode("utf-8", "replace")) for b in batches for p in b.pairs]
    return {"repeated": float(sum(n for n, _ in counts)), "repeatable": float(sum(n for _, n in counts))}
