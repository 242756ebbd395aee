"""MiniLLM (arXiv 2306.08543) for any two tokenizers: reverse KL over whole texts, by policy gradient.

The gradient (paper, eq. 5) has a single-step part, exact over all next tokens, and a long part, the log-ratio of
everything that follows:

    - sum_t w_t [ grad E_{y ~ student}[ log teacher(y) - log student(y) ] + R_{t+1} grad log student(y_t) ]

With two tokenizers `t` runs over aligned chunks. Where a chunk is one token on both sides the single-step part is a
divergence of the two next-token distributions; where it is not, the chunk's own log-ratio stays in the policy gradient.
Rewards, returns and advantages are constants: no gradient flows through them.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from diglot.batches import AlignedBatch, pack
from diglot.data import to_sample
from diglot.errors import ConfigError
from diglot.heads import gathered
from diglot.objectives import Level, RowObjective, make_objective
from diglot.objectives.span import clipped_policy_gradient, span_advantages
from diglot.rendering import Conversation
from diglot.rollouts import TeacherMixture, continue_prefixes, mixture_weight, write_prefixes
from diglot.teachers import local
from diglot.trainers.base import DistillationTrainer, Ids, Window
from diglot.trainers.collate import pad_id
from diglot.trainers.config import MiniLLMConfig
from diglot.trainers.held import HeldBatch, load_held, save_held
from diglot.trainers.lanes import Lane
from diglot.trainers.served import auto_objective
from diglot.trainers.terms import Term
from diglot.trainers.windows import RepeatedWindows, repeated_stream

logger = logging.getLogger(__name__)


class MiniLLMTrainer(DistillationTrainer):
    """The student writes, the teacher's log-ratio rewards it; clipped policy gradient over inner epochs.

    Args:
        lm_dataset: rows with a completion (or `text`) for the language-modelling loss, weighted by `args.lm_coef`.
    """

    args: MiniLLMConfig
    config_class = MiniLLMConfig
    reads_rewards = True

    def __init__(self, *args: Any, lm_dataset: Any | None = None, **kwargs: Any) -> None:
        self.lm_dataset = lm_dataset
        super().__init__(*args, **kwargs)
        if lm_dataset is not None and self.args.lm_coef > 0 and self.is_fsdp_enabled:
            raise ConfigError(
                "lm_dataset needs a second forward pass before the backward pass, behind which FSDP frees the head "
                "that the first one still needs. Drop lm_dataset, set lm_coef to 0, or run without FSDP."
            )

    def _prepare_objectives(self) -> None:
        if len(self.lanes) > 1 and self.args.teacher_mixed_alpha > 0:
            self.args.teacher_mixed_alpha = 0.0
            logger.warning("teacher_mixed_alpha is 0: with several teachers the student writes alone.")
        if self.teacher.level < Level.HIDDEN:
            self._without_hidden_states()
        if self.args.use_vllm and self.args.teacher_mixed_alpha > 0:
            self.args.teacher_mixed_alpha = 0.0
            logger.warning("teacher_mixed_alpha is 0: vLLM samples from the student alone (use_vllm).")
        auto = auto_objective(self.teacher, self.same_vocabulary)
        if self.args.objective == "auto" and not self.args.single_step_decomposition:
            self.terms = []
        elif self.args.objective == "auto":
            # All shared tokens and one bin for the rest: nothing of the single step is ignored.
            exact = {} if self.same_vocabulary else {"top_k": None, "residual": True}
            options: dict[str, Any] = {"beta": 1.0, **exact}
            self.terms = [Term("single_step", 1.0, make_objective(auto, self.pair, **options))]
        else:
            self.terms = self.requested_terms(auto, beta=1.0)

    def _without_hidden_states(self) -> None:
        """Switch off what a served teacher cannot give, in the options too, and say so."""
        args, gives = self.args, f"{self.teacher.name}, which gives {self.teacher.level.name}"
        if args.objective == "auto" and args.single_step_decomposition:
            if not args.rkl_advantage:
                raise ConfigError(
                    "rkl_advantage=False leaves MiniLLM's single-step part alone, which needs the teacher's whole "
                    f"rows, and the teacher is {gives}. Set rkl_advantage, or name an objective."
                )
            args.single_step_decomposition = False
            logger.warning(
                "The single-step part is off: it needs the teacher's whole rows, and the teacher is %s. Its rewards "
                "stay in the policy gradient, which has more variance; the expectation is the same.",
                gives,
            )
        if args.teacher_mixed_alpha > 0:
            args.teacher_mixed_alpha = 0.0
            logger.warning("teacher_mixed_alpha is 0: the teacher cannot write, it is %s.", gives)

    def get_train_dataloader(self) -> DataLoader:
        """Of a stream, too, each window comes `num_iterations` times in a row."""
        stream = self.train_dataset
        if not isinstance(stream, IterableDataset):
            return super().get_train_dataloader()
        logger.warning("A stream is read in windows of %d rows; those behind the last whole one are not.", self._window)
        self.train_dataset = repeated_stream(stream, self._window, self.args.num_iterations)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = stream

    @property
    def _window(self) -> int:
        """Rows of an optimizer step, of all ranks."""
        args = self.args
        return args.train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes

    def _get_train_sampler(self, train_dataset: Any | None = None) -> Sampler | None:
        """Each window of data comes `num_iterations` times in a row: an inner epoch is one optimizer step."""
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if dataset is None or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        args = self.args
        return RepeatedWindows(len(dataset), self._window, args.num_iterations, seed=args.data_seed or args.seed)

    # ---- the window --------------------------------------------------------------------------------------------

    def prepare_window(self, window: Window) -> list[AlignedBatch]:
        if self._held is None or self.state.global_step % self.args.num_iterations == 0:
            self._held = self._prepare_rollouts(self.align_window(self.write_completions(window), on_policy=True))
        if self.lm_dataset is not None and self.args.lm_coef > 0:
            self._attach_references(self._held)
        for batch in self._held:
            self._log_rollout(batch)
        return self._held

    def _prepare_rollouts(self, batches: list[AlignedBatch]) -> list[AlignedBatch]:
        for batch in batches:
            self._score(batch)
        self._set_advantages(batches)
        return batches

    def sample(self, conversations: Sequence[Conversation], prompts: Sequence[Ids], seeds: Sequence[int]) -> list[Ids]:
        """Completions of the student, or of the mixture of student and teacher (`teacher_mixed_alpha`)."""
        if self.args.teacher_mixed_alpha == 0:
            return super().sample(conversations, prompts, seeds)
        with gathered(*self.teacher_models()):
            return self._sample_mixed(conversations, prompts, seeds) if prompts else []

    def _sample_mixed(
        self, conversations: Sequence[Conversation], prompts: Sequence[Ids], seeds: Sequence[int]
    ) -> list[Ids]:
        """Completions of the mixture."""
        alpha, longest = self.args.teacher_mixed_alpha, self.args.max_completion_length
        teacher, student = local(self.teacher, "teacher_mixed_alpha"), self.student
        if self.same_vocabulary:
            own = self.teacher_prompts(conversations)
            mixture = TeacherMixture(teacher.model, own, pad_id(teacher.renderer), alpha, teacher.running)
            return self.sampler(student, prompts, max_new_tokens=longest, seed=seeds, processors=[mixture])
        with teacher.running() as model:
            prefixes = write_prefixes(
                [self.reader.teacher_reads(c) for c in conversations],
                [self.opens_thinking(c) for c in conversations],
                model,
                teacher.renderer,
                self.student_renderer,
                self.sampler_for(teacher.renderer),
                alpha=alpha,
                max_new_tokens=longest,
                seed=seeds,
            )
        return continue_prefixes(self.sampler, student, prompts, prefixes, max_new_tokens=longest, seed=seeds)

    @torch.no_grad()
    def _score(self, batch: AlignedBatch) -> None:
        """Log-probs of the completion under both models as they are now, and the weights of teacher-mixed sampling."""
        temperature = self.args.kd_temperature
        if batch.logp_old is None:  # given when the rollouts come from a checkpoint
            hidden = self.hidden_at_rows(self.student, batch.student)
            batch.logp_old = self.logps(hidden, batch.student, "student", temperature)
            self.rollouts.measure(batch, hidden)
        batch.logp_t = self.teacher_logps(batch, temperature)  # the student first: a served teacher answers meanwhile
        if self.args.teacher_mixed_alpha > 0:
            batch.weight = mixture_weight(
                batch.logp_old,
                batch.logp_t,
                batch.alignment,
                self.args.teacher_mixed_alpha,
                None if self.same_vocabulary else self.args.max_completion_length,
            )

    def _set_advantages(self, batches: Sequence[AlignedBatch]) -> None:
        """Advantages of the window, whitened over all its tokens on all ranks, and the counts of each term."""
        found = [self._raw_advantages(batch) for batch in batches]
        scored = [values[self._scored(batch)].double() for values, batch in zip(found, batches, strict=True)]
        sums = self.count_over_ranks(
            {
                "tokens": float(sum(len(values) for values in scored)),
                "sum": float(sum(values.sum() for values in scored)),
                "squares": float(sum(values.square().sum() for values in scored)),
                **self.term_counts(batches),
            }
        )
        count = max(sums["tokens"], 1.0)
        # An exact single step belongs to the same sum over tokens as the policy gradient; others have their own mean.
        terms = {t.name: sums["tokens"] if _is_single_step(t) else sums[t.name] for t in self.terms}
        mean = sums["sum"] / count
        deviation = max(sums["squares"] / count - mean * mean, 0.0) ** 0.5
        for batch, values in zip(batches, found, strict=True):
            batch.counts = {"tokens": sums["tokens"], **terms}
            batch.advantage = (values - mean) / (deviation + 1e-8) if self.args.whiten_advantages else values

    def _raw_advantages(self, batch: AlignedBatch) -> Tensor:
        """Advantages of one micro-batch as the rewards give them, [N_s]."""
        assert batch.logp_old is not None and batch.logp_t is not None
        return span_advantages(
            batch.logp_old,
            batch.logp_t,
            batch.alignment,
            gamma=self.args.gamma,
            length_normalization=self.args.length_normalization,
            reward_clip=self.args.reward_clip,
            dense=self._dense(batch),
        )

    def _scored(self, batch: AlignedBatch) -> Tensor:
        """Which student tokens lie in an exact chunk, bool [N_s]."""
        return batch.alignment.in_exact_chunk(batch.alignment.chunk_s)

    def _dense(self, batch: AlignedBatch) -> Tensor | None:
        """Which student tokens have the single-step part as an exact divergence, bool [N_s]: not rewarded for it."""
        exact = [term for term in self.terms if _is_single_step(term)]
        if not exact:
            return None
        covered = torch.zeros_like(batch.alignment.chunk_s, dtype=torch.bool)
        for term in exact:
            covered.index_fill_(0, term.plan(batch).student.to(covered.device), True)
        return covered

    def _log_rollout(self, batch: AlignedBatch) -> None:
        assert batch.logp_old is not None and batch.logp_t is not None
        gap = float(batch.logp_old.sum() - batch.logp_t.sum())
        self._metrics.add_mean("reverse_kl", gap, batch.stats["samples"])  # nats per completion, one sample each
        if batch.weight is not None:
            self._metrics.add_mean("minillm/weight", float(batch.weight.sum()), len(batch.weight))

    # ---- the loss ----------------------------------------------------------------------------------------------

    def batch_loss(self, model: torch.nn.Module, batch: AlignedBatch) -> Tensor:
        assert batch.counts is not None
        share = self.accelerator.num_processes / max(batch.counts["tokens"], 1.0)
        hidden = self.hidden_at_rows(model, batch.student)
        loss = hidden.sum() * 0.0
        if self.args.rkl_advantage:
            loss = loss + share * self._policy_gradient(hidden, batch)
        if self.terms:
            loss = loss + self.terms_loss(self.terms, hidden, batch)
        if self.lm_dataset is not None and self.args.lm_coef > 0:
            lm_share = self.args.lm_coef * self.accelerator.num_processes / max(batch.counts["lm"], 1.0)
            loss = loss + lm_share * self._language_modelling(model, batch)
        return loss

    def _policy_gradient(self, hidden: Tensor, batch: AlignedBatch) -> Tensor:
        assert batch.logp_old is not None and batch.advantage is not None
        logp = self.logps(hidden, batch.student, "student", self.args.kd_temperature)
        surrogate, clipped = clipped_policy_gradient(
            logp, batch.logp_old, batch.advantage, self.args.epsilon, batch.weight
        )
        if batch.sampler_weight is not None:
            surrogate = surrogate * batch.sampler_weight
        scored = self._scored(batch)
        self._metrics.add_mean("minillm/clip_ratio", float((clipped & scored).sum()), float(scored.sum()))
        return surrogate[scored].sum()

    # ---- the language-modelling loss ---------------------------------------------------------------------------

    def _attach_references(self, batches: Sequence[AlignedBatch]) -> None:
        """Give each micro-batch rows of `lm_dataset`, chosen by seed, step and place: the same after a resume."""
        assert self.lm_dataset is not None
        seeds = self.row_seeds("lm", [range(self.args.train_batch_size)] * len(batches))
        for batch, of_batch in zip(batches, seeds, strict=True):
            rows = [random.Random(seed).randrange(len(self.lm_dataset)) for seed in of_batch]
            samples = [to_sample(self.lm_dataset[i], where=f"lm_dataset row {i}") for i in rows]
            rendered = [r for sample in samples if (r := self.reader.reference(sample)) is not None]
            segments = [len(r.segment_bytes) for r in rendered]
            batch.reference = pack(rendered, segments, pad_id(self.student_renderer)).to(self.args.device)
        total = self.count_over_ranks({"lm": float(sum(len(b.reference.rows) for b in batches if b.reference))})
        for batch in batches:
            batch.counts = {**(batch.counts or {}), **total}

    def _language_modelling(self, model: torch.nn.Module, batch: AlignedBatch) -> Tensor:
        """Cross-entropy on the reference text: sum over its tokens, nats."""
        assert batch.reference is not None
        hidden = self.hidden_at_rows(model, batch.reference)
        logp = self.logps(hidden, batch.reference, "student")
        self._metrics.add_mean("minillm/lm_loss", -float(logp.detach().sum()), len(logp))
        return -logp.sum()

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def save_extras(self, folder: Path) -> None:
        """Also the completions that the next inner epochs still need."""
        super().save_extras(folder)
        for lane in self.lanes:
            if lane.held is not None and not self.args.save_only_model:
                save_held(folder, self._held_name(lane), [_held_of(batch) for batch in lane.held])

    def restore(self, checkpoint: Path) -> None:
        super().restore(checkpoint)
        for lane in self.each_lane():
            self._restore_held(load_held(checkpoint, self._held_name(lane)))

    def _held_name(self, lane: Lane) -> str:
        """What the completions of a lane are called beside a checkpoint."""
        rank, number = self.args.process_index, self.lanes.index(lane)
        return f"{rank}-{number}" if number else str(rank)

    def _restore_held(self, held: list[HeldBatch] | None) -> None:
        if held is None or self.state.global_step % self.args.num_iterations == 0:
            return
        batches = []
        for one in held:
            pairs = [self.reader.sampled(c, ids) for c, ids in zip(one.conversations, one.completions, strict=True)]
            batches.append(self.align(pairs, on_policy=True))
            batches[-1].logp_old, batches[-1].places = one.logp_old.to(self.args.device), one.places
            if one.sampler_weight is not None:
                batches[-1].sampler_weight = one.sampler_weight.to(self.args.device)
        self._held = self._prepare_rollouts(batches)


def _is_single_step(term: Term) -> bool:
    return isinstance(term.objective, RowObjective) and term.objective.is_single_step


def _held_of(batch: AlignedBatch) -> HeldBatch:
    assert batch.logp_old is not None
    completions = [pair.student.ids[pair.prompt_length :] for pair in batch.pairs]
    conversations = [pair.conversation for pair in batch.pairs]
    return HeldBatch(conversations, completions, batch.logp_old, batch.places, batch.sampler_weight)
