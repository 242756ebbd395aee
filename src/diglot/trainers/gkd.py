"""Generalised knowledge distillation (GKD, arXiv 2306.13649) for any two tokenizers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from diglot.batches import ReadPair
from diglot.comparisons import Comparison, Read, Term, Texts, defaults_of, entries_of, terms_of
from diglot.comparisons.auto import auto_objective
from diglot.comparisons.rows import checked_rows
from diglot.data import Sample
from diglot.errors import ConfigError
from diglot.heads import gathered
from diglot.options import GKDConfig
from diglot.rollouts.ahead import Window
from diglot.teachers import local
from diglot.teachers.cache import cached
from diglot.trainers.base import DistillationTrainer


class GKDTrainer(DistillationTrainer):
    """The student writes (a share `lmbda` of steps), the teacher judges every row, the student follows.

    On the other steps completions come from the dataset, or from the teacher with `seq_kd`. The divergence is the
    generalised JSD with `beta`, of whole vocabularies if they are equal (`jsd`) and of what comes next given the text
    if not (`covering`); `objective` names others, alone or as a weighted sum.
    """

    args: GKDConfig
    config_class = GKDConfig

    def terms(self, comparison: Comparison) -> list[Term]:
        args, auto = self.args, auto_objective(comparison).name
        if args.seq_kd:
            local(comparison.teacher, "seq_kd (the teacher writes)")
        if args.teacher_cache_dir is not None:
            local(comparison.teacher, "teacher_cache_dir (hidden states)")
        entries = [replace(one, name=auto) if one.name == "auto" else one for one in entries_of(args.objective)]
        return terms_of(entries, comparison.pair, defaults_of(args, args.beta))

    def _to_device(self) -> dict[str, Any]:
        parameters, folder = super()._to_device(), self.args.teacher_cache_dir
        if folder is not None and self.is_fsdp_enabled:
            raise ConfigError(
                f"teacher_cache_dir={folder!r} lets each process ask the teacher about other texts, and FSDP spreads "
                "the teacher over all of them. Drop it, or run without FSDP."
            )
        if folder is not None:
            self.comparisons = [replace(one, cache=cached(one.teacher, folder)) for one in self.comparisons]
        return parameters

    def usable_rows(self, train: Any, evaluation: Any) -> tuple[Any, Any]:
        """On steps that are not on-policy the completions of the data are read."""
        share, replies = 1 - self.args.lmbda, None
        if share > 0 and not self.args.seq_kd:
            replies = (
                f"lmbda={self.args.lmbda} takes the completions of the data in {share:.0%} of the steps: "
                "give one, train on-policy alone (lmbda: 1), or let the teacher write (seq_kd)"
            )
        return checked_rows(self.comparisons, self.args, train, evaluation, replies)

    def student_writes_at(self, step: int) -> bool:
        return self.draw("lmbda", step) < self.args.lmbda

    def texts(self, window: Window) -> Texts:
        """One draw a step decides who writes: the student, or the data (with `seq_kd` each teacher)."""
        if self.student_writes_at(self.state.global_step):
            return self.student_writes(window)
        if self.args.seq_kd:
            return self.teachers_write(window)
        reads = [[tuple(one.reader.written(s) for one in self.comparisons) for s in batch] for batch in window]
        return Texts(reads, on_policy=False, from_data=True)

    def teachers_write(self, window: Window) -> Texts:
        """Each teacher writes in its own ids and template, and is compared on its own text."""
        seeds = self.row_seeds("seq_kd", window)
        reads: list[list[Read]] = [[] for _ in window]
        for k, one in enumerate(self.comparisons):
            written = self._written_by(one, window, seeds)
            for batch, of_batch in zip(window, reads, strict=True):
                own = [next(written) for _ in batch]
                of_batch += [tuple(pair if j == k else None for j in range(len(self.comparisons))) for pair in own]
        return Texts(reads, on_policy=False, by_all=False)

    def _written_by(self, one: Comparison, window: Window, seeds: list[list[int]]) -> Iterator[ReadPair | None]:
        """What a teacher writes for the rows of the window, as both sides read it."""
        samples = [sample for batch in window for sample in batch]
        prompts = one.teacher_prompts([s.conversation for s in samples])
        with local(one.teacher, "seq_kd").running() as model, gathered(*self.teacher_models()):
            completions = self.sampler_for(one.teacher.renderer)(
                model,
                prompts,
                max_new_tokens=self.args.max_completion_length,
                seed=[seed for batch in seeds for seed in batch],
            )
        return (self._teacher_wrote(one, s, ids) for s, ids in zip(samples, completions, strict=True))

    def _teacher_wrote(self, one: Comparison, sample: Sample, completion: Any) -> ReadPair | None:
        inside = self.student_renderer.opens_thinking(sample.conversation)
        read = one.reader.teacher_reads(sample.conversation)
        written = one.teacher.renderer.from_sampled(read, completion, thinking=inside)
        reply = written.reply
        assert reply is not None
        answer = None if reply.whole is not None else reply
        own = Sample(sample.conversation, reply.text if answer else reply.whole, sample.where, answer)
        return one.reader.written(own, stopped=written.stopped[-1])
