"""Generalised knowledge distillation (GKD, arXiv 2306.13649) for any two tokenizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diglot.batches import AlignedBatch, ReadPair
from diglot.data import Sample
from diglot.errors import ConfigError
from diglot.heads import gathered
from diglot.teachers import local
from diglot.teachers.cache import cached
from diglot.trainers.base import DistillationTrainer, Window
from diglot.trainers.config import GKDConfig
from diglot.trainers.served import auto_objective


class GKDTrainer(DistillationTrainer):
    """The student writes (a share `lmbda` of steps), the teacher judges every row, the student follows.

    On the other steps completions come from the dataset, or from the teacher with `seq_kd`. The divergence is the
    generalised JSD with `beta`, on whole vocabularies if they are equal and on one-to-one rows of shared tokens if not;
    `objective` names others, alone or as a weighted sum.
    """

    args: GKDConfig
    config_class = GKDConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        folder = self.args.teacher_cache_dir
        if folder is not None and self.is_fsdp_enabled:
            raise ConfigError(
                f"teacher_cache_dir={folder!r} lets each process ask the teacher about other texts, and FSDP spreads "
                "the teacher over all of them. Drop it, or run without FSDP."
            )
        for _ in self.each_lane():
            self.cached_teacher = None if folder is None else cached(self.teacher, folder)

    def _prepare_objectives(self) -> None:
        if self.args.seq_kd:
            local(self.teacher, "seq_kd (the teacher writes)")
        auto = auto_objective(self.teacher, self.same_vocabulary)
        self.terms = self.requested_terms(auto, beta=self.args.beta)

    # ---- the window --------------------------------------------------------------------------------------------

    def prepare_window(self, window: Window) -> list[AlignedBatch]:
        on_policy = self.draw("lmbda") < self.args.lmbda
        if on_policy:
            pairs = self.write_completions(window)
        elif self.args.seq_kd:
            pairs = self.teacher_completions(window)
        else:
            pairs = [[self.reader.written(sample) for sample in batch] for batch in window]
        batches = self.align_window(pairs, on_policy)
        counts = self.count_over_ranks(self.term_counts(batches))
        for batch in batches:
            batch.counts = counts
        return batches

    def teacher_completions(self, window: Window) -> list[list[ReadPair | None]]:
        """The teacher writes in its own ids and template; both sides then read its text."""
        renderer = self.teacher.renderer
        samples = [sample for batch in window for sample in batch]
        prompts = self.teacher_prompts([s.conversation for s in samples])
        with local(self.teacher, "seq_kd").running() as model, gathered(*self.teacher_models()):
            completions = self.sampler_for(renderer)(
                model,
                prompts,
                max_new_tokens=self.args.max_completion_length,
                seed=[seed for batch in self.row_seeds("seq_kd", window) for seed in batch],
            )
        pairs = iter(map(self._teacher_wrote, samples, completions))
        return [[next(pairs) for _ in batch] for batch in window]

    def _teacher_wrote(self, sample: Sample, completion: Any) -> ReadPair | None:
        inside = self.opens_thinking(sample.conversation)
        read = self.reader.teacher_reads(sample.conversation)
        written = self.teacher.renderer.from_sampled(read, completion, thinking=inside)
        reply = written.reply
        assert reply is not None
        answer = None if reply.whole is not None else reply
        own = Sample(sample.conversation, reply.text if answer else reply.whole, sample.where, answer)
        return self.reader.written(own, stopped=written.stopped[-1])

    def ask_teacher(self, batch: AlignedBatch) -> Tensor:
        """From the cache where the text is the dataset's: what is sampled does not come again."""
        if self.cached_teacher is None or batch.on_policy or self.args.seq_kd:
            return super().ask_teacher(batch)
        hidden = self.cached_teacher.hidden(batch.teacher)
        for name, count in zip(("hits", "misses"), self.cached_teacher.take_counts(), strict=True):
            self._metrics.add_count(f"teacher/cache_{name}", count)
        return hidden

    # ---- the loss ----------------------------------------------------------------------------------------------

    def batch_loss(self, model: torch.nn.Module, batch: AlignedBatch) -> Tensor:
        hidden = self.hidden_at_rows(model, batch.student)
        self.rollouts.measure(batch, hidden)  # before the first step on what was written
        return hidden.sum() * 0.0 + self.terms_loss(self.terms, hidden, batch)
