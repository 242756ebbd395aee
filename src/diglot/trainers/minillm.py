"""MiniLLM (arXiv 2306.08543) for any two tokenizers: reverse KL over whole texts, by policy gradient.

The gradient (paper, eq. 5) has a single-step part, exact over all next tokens, and a long part, the log-ratio of
everything that follows:

    - sum_t w_t [ grad E_{y ~ student}[ log teacher(y) - log student(y) ] + R_{t+1} grad log student(y_t) ]

With two tokenizers the single-step part is the divergence from the covering distribution, and a control variate: what
it does not explain of the text's log-ratio stays in the policy gradient (docs/objectives.md).
Rewards, returns and advantages are constants: no gradient flows through them.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from diglot.arrays import Ids
from diglot.batches import ReadPair, pad_id
from diglot.batches.sending import sent
from diglot.batches.windows import RepeatedWindows, repeated_stream
from diglot.checkpoints.held import HeldBatch, load_held, save_held
from diglot.comparisons import (
    Batch,
    Comparison,
    Term,
    Texts,
    View,
    defaults_of,
    entries_of,
    make_batch,
    scores_of,
    terms_of,
)
from diglot.comparisons.auto import explained_by, single_step
from diglot.comparisons.counts import set_counts
from diglot.comparisons.rows import checked_texts
from diglot.comparisons.scores import ModelScores, check_temperature
from diglot.data import to_sample
from diglot.errors import ConfigError
from diglot.heads import dropouts, even_passes, gathered
from diglot.objectives import Level, PolicyGradient, Rollout, make_objective
from diglot.objectives.span import Span, span_advantages
from diglot.options import MiniLLMConfig
from diglot.rendering import Conversation, Rendered
from diglot.rollouts import TeacherMixture, continue_prefixes, mixture_weight, write_prefixes
from diglot.rollouts.ahead import Window
from diglot.teachers import LocalTeacher, local
from diglot.trainers.base import DistillationTrainer

logger = logging.getLogger(__name__)


class MiniLLMTrainer(DistillationTrainer):
    """The student writes, the teacher's log-ratio rewards it; clipped policy gradient over inner epochs.

    Args:
        lm_dataset: rows with a completion (or `text`) for the language-modelling loss, weighted by `args.lm_coef`.

    All others are those of `DistillationTrainer`.
    """

    args: MiniLLMConfig
    config_class = MiniLLMConfig
    held: list[Batch] | None = None  # batches that serve several optimizer steps

    def __init__(
        self,
        model: PreTrainedModel | str,
        teacher_model: PreTrainedModel | str | Sequence[Any] | None = None,
        args: MiniLLMConfig | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: Any | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None = None,
        *,
        lm_dataset: Dataset | None = None,
    ) -> None:
        self.lm_dataset = lm_dataset
        if lm_dataset is None and args is not None and getattr(args, "lm_coef", 0) not in (0, MiniLLMConfig.lm_coef):
            raise ConfigError(
                f"lm_coef={args.lm_coef} weighs a loss on texts to imitate, and there are none. Pass lm_dataset, or "
                "drop it."
            )
        super().__init__(
            model, teacher_model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics,
            callbacks, optimizers, peft_config, teacher_processing_class,
        )  # fmt: skip
        if dropout := max((value for *_, value in dropouts(self.student)), default=0.0):
            logger.warning(
                "The student has a dropout or jitter of %s: ratios of the policy are noise. Set disable_dropout: true.",
                dropout,
            )
        if self.args.neftune_noise_alpha:
            logger.warning(
                "neftune_noise_alpha=%s adds noise to the student's embeddings in training: ratios of the policy are "
                "noise. Drop it.",
                self.args.neftune_noise_alpha,
            )
        kd_temperature = self.args.kd_temperature
        if (self.args.temperature, self.args.top_p, self.args.top_k) != (kd_temperature, 1, 0):
            logger.warning(
                "The student does not write from its own distribution at kd_temperature=%s (temperature=%s, top_p=%s, "
                "top_k=%s), for whose draws the policy gradient takes these texts.",
                *(kd_temperature, self.args.temperature, self.args.top_p, self.args.top_k),
            )
        self.mixed_alpha = self._mixed_alpha()
        self.observer.own_draws &= self.mixed_alpha == 0
        if lm_dataset is None or self.args.lm_coef == 0:
            return
        if self.is_fsdp_enabled:
            raise ConfigError(
                "lm_dataset needs a second forward pass before the backward pass, behind which FSDP frees the head "
                "that the first one still needs. Drop lm_dataset, set lm_coef to 0, or run without FSDP."
            )
        term = Term("lm", self.args.lm_coef, make_objective("ce", self.comparisons[0].pair), "minillm/lm_", True)
        common = dict(label="lm", weight=1.0, terms=(term,), unscored_roles=frozenset(), asks=False)
        self.imitations = [replace(self.comparisons[0], **common)]  # type: ignore[arg-type]

    # ---- what is compared ----------------------------------------------------------------------------------------

    def terms(self, comparison: Comparison) -> list[Term]:
        """The policy gradient, and the exact single step (`auto`) or what `objective` names beside it."""
        args, terms, named = self.args, [], []
        if args.rkl_advantage:
            terms.append(Term("policy_gradient", 1.0, PolicyGradient(epsilon=args.epsilon), "minillm/", True))
        if comparison.teacher.level < Level.HIDDEN:
            check_temperature(args.kd_temperature, "log-probs")
        for entry in entries_of(args.objective):
            if entry.name != "auto":
                named.append(entry)
            elif entry.options:
                raise ConfigError(
                    f"objective 'auto' of MiniLLM takes a weight alone, not {', '.join(sorted(entry.options))}: its "
                    "single step is the reverse KL. Drop the options, or name the objective, such as covering."
                )
            elif self._has_single_step(comparison):
                terms.append(Term("single_step", entry.weight, single_step(comparison)))
        terms += terms_of(named, comparison.pair, defaults_of(args, 1.0))
        if args.kd_temperature != 1 and args.num_iterations > 1 and any(isinstance(t.objective, Span) for t in terms):
            raise ConfigError(
                f"Objective 'span' reads log-probs at temperature 1, and those of num_iterations={args.num_iterations} "
                f"steps ago are known at kd_temperature={args.kd_temperature} alone. Set one of both to 1."
            )
        return terms

    def _has_single_step(self, comparison: Comparison) -> bool:
        """Is the single step an exact divergence? A teacher without whole rows rewards it instead, which is said."""
        args, teacher = self.args, comparison.teacher
        if not args.single_step_decomposition or teacher.level >= Level.HIDDEN:
            return args.single_step_decomposition
        gives = f"{teacher.name}, which gives {teacher.level.name}"
        if not args.rkl_advantage:
            raise ConfigError(
                "rkl_advantage=False leaves MiniLLM's single-step part alone, which needs the teacher's whole "
                f"rows, and the teacher is {gives}. Set rkl_advantage, or name an objective."
            )
        logger.warning(
            "The single-step part is off: it needs the teacher's whole rows, and the teacher is %s. Its rewards "
            "stay in the policy gradient, which has more variance; the expectation is the same.",
            gives,
        )
        return False

    def _mixed_alpha(self) -> float:
        """`teacher_mixed_alpha`, or 0 where the teacher cannot take part in sampling; says why."""
        alpha, teacher = self.args.teacher_mixed_alpha, self.comparisons[0].teacher
        if alpha == 0:
            return 0.0
        if len(self.comparisons) > 1:
            why = "with several teachers the student writes alone"
        elif not isinstance(teacher, LocalTeacher):
            why = f"the teacher cannot write here, it is {teacher.name}"
        elif self.args.use_vllm:
            why = "vLLM samples from the student alone (use_vllm)"
        elif self.args.rollout_ahead:
            why = "what is written ahead is weighted by the student's own ratio (rollout_ahead)"
        else:
            return alpha
        logger.warning("teacher_mixed_alpha is 0: %s.", why)
        return 0.0

    def items(self, view: View) -> Mapping[str, float]:
        """An exact single step belongs to the same mean over tokens as the policy gradient; others have their own."""
        tokens, terms = float(view.read.written.usable_s.sum()), view.comparison.terms
        return {**view.items(), **{t.name: tokens for t in terms if t.objective.is_single_step}}

    def usable_rows(self, train: Any, evaluation: Any) -> tuple[Any, Any]:
        self.lm_dataset = checked_texts(self.comparisons[0], self.args, self.lm_dataset)
        return super().usable_rows(train, evaluation)

    def get_train_dataloader(self) -> DataLoader[Any]:
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
        rows: int = self._train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        return rows

    def _get_train_sampler(self, train_dataset: Any | None = None) -> Sampler[int] | None:
        """Each window of data comes `num_iterations` times in a row: an inner epoch is one optimizer step."""
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if dataset is None or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        args = self.args
        seed, shuffled = (
            args.seed if args.data_seed is None else args.data_seed,
            args.train_sampling_strategy == "random",
        )
        return RepeatedWindows(len(dataset), self._window, args.num_iterations, seed, shuffled=shuffled)

    # ---- the window ----------------------------------------------------------------------------------------------

    def prepare(self, window: Window) -> list[Batch]:
        """Completions and their rewards serve `num_iterations` steps; texts to imitate are drawn for each."""
        if self.held is None or self.state.global_step % self.args.num_iterations == 0:
            self.held = self.rewarded(super().prepare(window))
        if self.imitations:
            self._attach_references(self.held)
        # Of samples of something else than the student, the mean log-ratio is no divergence: it can be negative.
        estimates = self.observer.own_draws and self.args.kd_temperature == 1
        for view, rollout in self._views(self.held):
            gap = _sum(rollout.logp_old, view.read.written.usable_s) - _sum(rollout.logp_t, view.read.written.usable_t)
            name = "reverse_kl" if estimates else "minillm/log_ratio"
            self.metrics.add_total(name, gap, len(view.read.pairs))  # nats per completion, one sample each
            if rollout.weight is not None:
                self.metrics.add_total("minillm/weight", rollout.weight.sum(), len(rollout.weight))
        return self.held

    def texts(self, window: Window) -> Texts:
        return self.student_writes(window)

    @staticmethod
    def _views(batches: Sequence[Batch]) -> list[tuple[View, Rollout]]:
        return [(view, view.rollout) for batch in batches for view in batch.views if view.rollout is not None]

    def rewarded(self, batches: list[Batch], known: Mapping[tuple[int, int], HeldBatch] | None = None) -> list[Batch]:
        """Log-probs of the completions under both models as they are now, weights of sampling, and advantages.

        Under the autocast of training: the ratio of the first inner step is one.

        `known`: what the student said of batch and view, where it was kept from when it wrote.
        """
        with self.accelerator.autocast(), torch.no_grad():
            return self._rewarded(batches, known)

    def _rewarded(self, batches: list[Batch], known: Mapping[tuple[int, int], HeldBatch] | None) -> list[Batch]:
        for i, batch in enumerate(batches):
            hidden = self.hidden_at_rows(self.student, batch.student)
            self.rollouts.measure(batch, hidden, self.state.global_step)
            with even_passes(*self.teacher_models()):
                for k, view in enumerate(batch.views):
                    scores = scores_of(batch, view, hidden, self.student_head)
                    rollout = self._rollout(view, scores, None if known is None else known[i, k])
                    batch.views[k] = replace(view, rollout=rollout)
        self._set_advantages(batches)
        return batches

    def _rollout(self, view: View, scores: ModelScores, held: HeldBatch | None) -> Rollout:
        """What both models say of one view's completions; `held`, what the student said when it wrote them."""
        temperature, alpha = self.args.kd_temperature, self.mixed_alpha
        logp_old = scores.student_text(temperature) if held is None else held.logp_old.to(self.args.device)
        logp_t = scores.teacher_text(temperature)  # the student first: a served teacher answers meanwhile
        weight = None
        if alpha > 0:
            longest = None if view.comparison.reader.same_vocabulary else self.args.max_completion_length
            weight = mixture_weight(logp_old, logp_t, view.read.alignment, alpha, longest)
        scores.rollout = rollout = Rollout(logp_old, logp_t, weight)
        return replace(rollout, explained=explained_by(view, scores) if held is None else held.explained)

    def _set_advantages(self, batches: Sequence[Batch]) -> None:
        """Advantages of the window, whitened for each comparison over all its tokens on all ranks."""
        advantages: dict[tuple[int, int], Tensor] = {}
        sums: dict[str, float] = {}
        on_device: list[Tensor] = []
        for i, batch in enumerate(batches):
            for k, view in enumerate(batch.views):
                advantages[i, k] = values = self.advantages(view)
                usable = view.read.written.usable_s
                sums[f"{k}/count"] = sums.get(f"{k}/count", 0.0) + float(usable.sum())
                on_device.append(torch.stack([_sum(values, usable), _sum(values.double().square(), usable)]))
        both = torch.stack(on_device).tolist() if on_device else []  # one copy for the window
        for (_, k), (total, squares) in zip(advantages, both, strict=True):
            sums[f"{k}/sum"] = sums.get(f"{k}/sum", 0.0) + total
            sums[f"{k}/squares"] = sums.get(f"{k}/squares", 0.0) + squares
        totals = self.count_over_ranks(sums)
        for (i, k), values in advantages.items():
            count = max(totals[f"{k}/count"], 1.0)
            mean = totals[f"{k}/sum"] / count
            deviation = max(totals[f"{k}/squares"] / count - mean * mean, 0.0) ** 0.5
            if self.args.whiten_advantages:
                values = (values - mean) / (deviation + 1e-8)
            view = batches[i].views[k]
            assert view.rollout is not None
            batches[i].views[k] = replace(view, rollout=replace(view.rollout, advantage=values))

    def advantages(self, view: View) -> Tensor:
        """Advantages of one view as the rewards give them, [N_s]."""
        assert view.rollout is not None
        return span_advantages(
            view.rollout.logp_old,
            view.rollout.logp_t,
            view.read.alignment,
            gamma=self.args.gamma,
            length_normalization=self.args.length_normalization,
            reward_clip=self.args.reward_clip,
            explained=view.rollout.explained,
        )

    def _attach_references(self, batches: Sequence[Batch]) -> None:
        """Give each micro-batch rows of `lm_dataset`, chosen by seed, step and place: the same after a resume."""
        assert self.lm_dataset is not None
        (compared,), data = self.imitations, self.lm_dataset
        seeds = self.row_seeds("lm", [range(self._train_batch_size)] * len(batches))
        for batch, of_batch in zip(batches, seeds, strict=True):
            rows = [random.Random(seed).randrange(len(data)) for seed in of_batch]
            samples = [to_sample(data[i], where=f"lm_dataset row {i}") for i in rows]
            texts = [(s.conversation, r) for s in samples if (r := compared.reader.reference(s)) is not None]
            reads = [(_alone(conversation, rendered),) for conversation, rendered in texts]
            batch.reference = make_batch([compared], reads, range(len(reads)), on_policy=False)
        set_counts([b.reference for b in batches if b.reference], View.items, self.count_over_ranks)

    # ---- teacher-mixed sampling ----------------------------------------------------------------------------------

    def sample(self, conversations: Sequence[Conversation], prompts: Sequence[Ids], seeds: Sequence[int]) -> list[Ids]:
        """Completions of the student, or of the mixture of student and teacher (`teacher_mixed_alpha`)."""
        if self.mixed_alpha == 0:
            return super().sample(conversations, prompts, seeds)
        with gathered(*self.teacher_models()):
            return self._sample_mixed(conversations, prompts, seeds) if prompts else []

    def _sample_mixed(
        self, conversations: Sequence[Conversation], prompts: Sequence[Ids], seeds: Sequence[int]
    ) -> list[Ids]:
        """Completions of the mixture."""
        alpha, longest = self.mixed_alpha, self.args.max_completion_length
        (one,), student = self.comparisons, self.student
        teacher = local(one.teacher, "teacher_mixed_alpha")
        if one.reader.same_vocabulary:
            own, pad = one.teacher_prompts(conversations), pad_id(teacher.renderer)
            student_stops = self.student_renderer.stop_ids
            stops = student_stops, teacher.renderer.stop_ids
            mixture = TeacherMixture(teacher.model, own, pad, alpha, teacher.running, stops)
            return self.sampler(student, prompts, max_new_tokens=longest, seed=seeds, processors=[mixture])
        with teacher.running() as model:
            prefixes = write_prefixes(
                [one.reader.teacher_reads(c) for c in conversations],
                [self.student_renderer.opens_thinking(c) for c in conversations],
                model,
                teacher.renderer,
                self.student_renderer,
                self.sampler_for(teacher.renderer),
                alpha=alpha,
                max_new_tokens=longest,
                seed=seeds,
            )
        return continue_prefixes(self.sampler, student, prompts, prefixes, max_new_tokens=longest, seed=seeds)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def save_extras(self, folder: Path) -> None:
        """Also the completions that the next inner epochs still need."""
        super().save_extras(folder)
        if self.held is not None and not self.args.save_only_model:
            for k in range(len(self.comparisons)):
                save_held(folder, self._held_name(k), [held_of(batch, k) for batch in self.held])

    def _held_name(self, k: int) -> str:
        """What the completions of a comparison are called beside a checkpoint."""
        rank = self.args.process_index
        return f"{rank}-{k}" if k else str(rank)

    def restore(self, checkpoint: Path) -> None:
        super().restore(checkpoint)
        saved = [load_held(checkpoint, self._held_name(k)) for k in range(len(self.comparisons))]
        if None in saved or self.state.global_step % self.args.num_iterations == 0:
            return
        held: list[list[HeldBatch]] = [one for one in saved if one is not None]
        routed = any(c.route is not None for of_k in held for one in of_k for c in one.conversations)
        routed &= len(self.comparisons) > 1
        batches = [self._restored(of_views, routed) for of_views in zip(*held, strict=True)]
        known = {(i, k): one for k, of_k in enumerate(held) for i, one in enumerate(of_k)}
        set_counts(batches, self.items, self.count_over_ranks, routed)
        self.held = self.rewarded(batches, known)

    def _restored(self, of_views: Sequence[HeldBatch], routed: bool) -> Batch:
        """A micro-batch from what was kept of each view."""
        reads: dict[int, list[ReadPair | None]] = {}
        for k, (one, comparison) in enumerate(zip(of_views, self.comparisons, strict=True)):
            places = one.places if one.places is not None else range(len(one.completions))
            for place, conversation, ids in zip(places, one.conversations, one.completions, strict=True):
                pairs = reads.setdefault(place, [None] * len(self.comparisons))
                pairs[k] = comparison.reader.sampled(conversation, ids)
        order = sorted(reads) if len(self.comparisons) > 1 else list(reads)  # several are never sorted by length
        rows = [tuple(reads[place]) for place in order]
        batch = make_batch(self.comparisons, rows, order, on_policy=True, by_all=not routed)
        for view, weight in ((v, h.sampler_weight) for v, h in zip(batch.views, of_views, strict=True)):
            if weight is not None:
                if batch.sampler_weight is None:
                    batch.sampler_weight = torch.ones(len(batch.student.rows), device=self.args.device)
                own = slice(None) if view.tokens is None else view.tokens
                batch.sampler_weight[own] = weight.to(self.args.device)
        return batch


def _alone(conversation: Conversation, rendered: Rendered) -> ReadPair:
    """A text that only the student reads."""
    return ReadPair(conversation, rendered, rendered, np.zeros(len(rendered.scored), dtype=np.bool_))


def _sum(values: Tensor, chosen: np.ndarray) -> Tensor:
    return values[sent(torch.from_numpy(np.flatnonzero(chosen)), values.device)].double().sum()


def held_of(batch: Batch, k: int) -> HeldBatch:
    """What the next steps need of one view."""
    view, weight = batch.views[k], batch.sampler_weight
    assert view.rollout is not None
    pairs = view.read.pairs
    completions = [pair.student.ids[pair.student.prompt_length :] for pair in pairs]
    places = batch.places if view.texts is None else [batch.places[i] for i in view.texts]
    own = None if weight is None else view.of_own(weight)
    conversations, rollout = [pair.conversation for pair in pairs], view.rollout
    return HeldBatch(conversations, completions, rollout.logp_old, places, own, rollout.explained)
