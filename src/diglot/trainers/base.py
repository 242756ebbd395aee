"""What GKD and MiniLLM share: two models, two renderings, one alignment; a window of micro-batches per optimizer step.

One optimizer step works on one *window*: all micro-batches of its accumulation steps. The window is where completions
are sampled (in one call), where both sides are read and aligned, and where the items over which the loss is averaged
are counted, over all ranks. What is left for `compute_loss` is a forward pass, a divergence and a sum.
"""

from __future__ import annotations

import logging
import random
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from diglot.batches import AlignedBatch, PackedSide, ReadPair, align_pairs
from diglot.data import Sample, to_sample
from diglot.errors import AlignmentError, ConfigError, RolloutsUnavailable, TeacherUnavailable
from diglot.evaluation import Evaluator, OnPolicyReport
from diglot.heads import Head, default_chunk_rows, gathered, hidden_at_rows, keep_after_forward, token_logps
from diglot.objectives import Level, PathObjective
from diglot.rendering import Conversation, Renderer, Role
from diglot.report import model_card
from diglot.rollouts import Completion, TransformersSampler
from diglot.teachers import LocalTeacher, local
from diglot.teachers.adapter import AdapterOff
from diglot.teachers.scored import ScoredTeacher
from diglot.trainers.collate import collate_samples, pad_id
from diglot.trainers.config import DistillationConfig
from diglot.trainers.engines import Rollouts
from diglot.trainers.finite import FiniteSteps
from diglot.trainers.lanes import HasLanes, mean_metrics, prepare_lanes, same_side, share_counts
from diglot.trainers.lengths import as_read, by_length
from diglot.trainers.manifest import describe_model, describe_objective, describe_teacher
from diglot.trainers.metrics import StepMetrics, evaluation_metrics, reference_metrics
from diglot.trainers.observing import Observer
from diglot.trainers.projectors import (
    add_to_optimizer,
    load_projectors,
    make_projectors,
    same_everywhere,
    save_projectors,
)
from diglot.trainers.ranks import check_wrapping, place_frozen, row_places, row_seed, with_all_names
from diglot.trainers.recording import RecordCallback, with_numbers
from diglot.trainers.scored import ScoredBatch
from diglot.trainers.served import prepare_served
from diglot.trainers.sides import describe, load_references, reference_logps
from diglot.trainers.terms import BatchScores, Reader, Term, check_level, terms_of

logger = logging.getLogger(__name__)

Window = list[list[Sample]]
Ids = NDArray[np.int64]


class DistillationTrainer(HasLanes, FiniteSteps):
    """Base of both trainers. Arguments and their order are TRL's; `teacher_processing_class` is the one addition.

    Args:
        model: the student, a model or its name.
        teacher_model: a model or its name, or a list of them; by default `args.teacher_model_name_or_path`.
        args: options.
        train_dataset: rows with `prompt`, `prompt` + `completion`, `messages` or `text`.
        processing_class: the student's tokenizer; by default the one beside its weights.
        teacher_processing_class: the teacher's tokenizer; by default `args.teacher_tokenizer_name_or_path`, else the
            one beside the teacher's weights.
        peft_config: makes the student a PEFT model.
    """

    args: DistillationConfig
    config_class: type[DistillationConfig] = DistillationConfig

    def __init__(
        self,
        model: PreTrainedModel | str,
        teacher_model: PreTrainedModel | str | Sequence[Any] | None = None,
        args: DistillationConfig | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: Any | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None = None,
    ) -> None:
        args = args if args is not None else self.config_class(output_dir="diglot-output")
        self._set_lanes(prepare_lanes(model, teacher_model, processing_class, teacher_processing_class, args))
        sides = self.lanes[0].sides
        self.student_renderer = sides.renderer
        # Before the Trainer's own setup, which makes the output folder: what cannot work leaves nothing behind.
        self.args = args
        self.rollouts = Rollouts(self)
        for lane in self.each_lane():
            self.pair = self.pair.to(args.device)
            self._prepare_objectives()
            check_level(self.terms, self.teacher.level, getattr(self.teacher, "also", ()))
            prepare_served(self.teacher, self.terms, args.kd_temperature, self.reads_rewards)
            self.references = load_references(lane.sides, self.terms, args)
        student: Any = sides.student
        if peft_config is not None:
            from peft import get_peft_model

            student = get_peft_model(student, peft_config)
        for lane in self.lanes:
            if isinstance(lane.teacher, AdapterOff):
                lane.teacher.follow(student)
        self._metrics = StepMetrics()
        super().__init__(
            model=student,
            args=args,
            data_collator=data_collator or collate_samples,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=sides.renderer.tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.loss_is_scaled_for_ga = True  # every micro-batch's loss is already a share of the window's
        check_wrapping(self.accelerator, len(self.lanes))
        self.student_head = Head.of(self.student)
        self.student_head.verify(self.student)
        self.projectors: dict[str, torch.nn.Parameter] = {}
        for lane in self.each_lane():
            self._to_device()
            own = make_projectors(self.terms, self.student_head, getattr(self.teacher, "head", None))
            self.projectors |= {n if lane is self.lanes[0] else f"{lane.label}/{n}": p for n, p in own.items()}
        same_everywhere(self.projectors, sharded=self.is_fsdp_enabled)
        self.observer = Observer(self)
        self.add_callback(RecordCallback(self.observer.fixed))
        with_numbers(self)
        if self.is_world_process_zero():
            for lane in self.lanes:
                logger.info("%s: %s", lane.label, describe(lane.sides))

    def _to_device(self) -> None:
        """Bring what a lane holds to where the student is."""
        for held in (self.teacher, *(self.references or ())):
            place_frozen(held, self.accelerator)
        for term in self.terms:
            if not isinstance(term.objective, PathObjective):
                term.objective.to(self.args.device)

    def teacher_models(self) -> list[PreTrainedModel]:
        """The teachers' models that are in this process beside the student's."""
        held = [lane.teacher for lane in self.lanes]
        return [one.model for one in held if isinstance(one, LocalTeacher) and not isinstance(one, AdapterOff)]

    @property
    def student(self) -> PreTrainedModel:
        """The model in training, without the wrappers of data parallelism."""
        return self.accelerator.unwrap_model(self.model)

    reads_rewards = False  # are log-probs of the text read at `kd_temperature`, whatever the terms are?

    @abstractmethod
    def _prepare_objectives(self) -> None:
        """Set `terms` from `args`, `pair` and `teacher`; called before the Trainer's own setup."""

    # ---- one window: sample, read, align, count ----------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, AlignedBatch]], int | None]:
        """All micro-batches of one optimizer step, ready for `compute_loss`."""
        keep_after_forward(self.student, self.student_head.module)
        window = [batch["samples"] for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        if not window:
            return [], None
        self.rows_of_window = [sample.where for batch in window for sample in batch]
        for projector in self.projectors.values():
            projector.grad = None  # the Trainer clears the gradients of its model only
        self._drawn.clear()
        if len(self.lanes) > 1:
            return self._lanes_of(window)
        batches = self.prepare_window(window)
        self._watch_coverage(batches)
        self.observer.window(batches)
        return [{"batch": batch} for batch in batches], int(sum(batch.stats["tokens"] for batch in batches))

    def _lanes_of(self, window: Window) -> tuple[list[dict[str, Any]], int]:
        """The same with several teachers: what each of them reads of every micro-batch."""
        weights, routed = self.lane_weights([sample for batch in window for sample in batch])
        found = [self.prepare_window(window) for _ in self.each_lane()]
        if routed:
            share_counts(found)
        counted = [batch for batches in found for batch in batches] if routed else found[0]
        self._watch_coverage(counted)
        self.observer.window(found[0])
        inputs = [{"batch": b[0], "lanes": list(b), "weights": weights} for b in zip(*found, strict=True)]
        return inputs, int(sum(batch.stats["tokens"] for batch in counted))

    @abstractmethod
    def prepare_window(self, window: Window) -> list[AlignedBatch]:
        """Sample or read completions, align them, and count what the loss is averaged over."""

    def write_completions(self, window: Window) -> list[list[ReadPair | None]]:
        """The student writes `num_generations` completions for each prompt of the window, in one call."""
        conversations = [[s.conversation for s in batch for _ in range(self.args.num_generations)] for batch in window]
        prompts = [
            [self.reader.prompt_ids(c, self.args.max_completion_length) for c in batch] for batch in conversations
        ]
        seeds = self.row_seeds("rollouts", window, self.args.num_generations)
        asked = [row for batch in zip(conversations, prompts, seeds, strict=True) for row in zip(*batch, strict=True)]
        kept = [(c, p, seed) for c, p, seed in asked if p is not None]
        drawn = b"/".join(p.tobytes() for _, p, _ in kept)
        if drawn not in self._drawn:
            with gathered(self.student):  # also where there is nothing to write: other ranks gather too
                own = [c for c, _, _ in kept], [p for _, p, _ in kept], [seed for _, _, seed in kept]
                self._drawn[drawn] = self.complete(*own)
        completions = iter(self._drawn[drawn])
        return [
            [None if p is None else self._read_sample(c, next(completions), p) for c, p in zip(*both, strict=True)]
            for both in zip(conversations, prompts, strict=True)
        ]

    def _read_sample(self, conversation: Conversation, completion: Completion, prompt: Ids) -> ReadPair | None:
        pair = self.reader.sampled(conversation, completion.ids, prompt)
        return pair if pair is None or completion.logps is None else pair.with_logps(completion.logps)

    def complete(
        self, conversations: Sequence[Conversation], prompts: Sequence[Ids], seeds: Sequence[int]
    ) -> list[Completion]:
        """One completion for each of the student's prompts, by the student as it is now or an engine's copy of it."""
        if self.rollouts.engine.own_weights:
            return self.rollouts.write(prompts, seeds)
        return [Completion(ids) for ids in self.sample(conversations, prompts, seeds)]

    def sample(self, conversations: Sequence[Conversation], prompts: Sequence[Ids], seeds: Sequence[int]) -> list[Ids]:
        """The same by the student itself."""
        return [one.ids for one in self.rollouts.write(prompts, seeds)]

    def sampler_for(self, renderer: Renderer) -> TransformersSampler:
        """A sampler for one of the two models, at the temperature of `args`."""
        args = self.args
        return TransformersSampler(renderer.stop_ids, pad_id(renderer), args.temperature, args.top_p, args.top_k)

    @property
    def sampler(self) -> TransformersSampler:
        """The student's sampler."""
        return self.sampler_for(self.student_renderer)

    def opens_thinking(self, conversation: Conversation) -> bool:
        """Does the student answer inside a think block? The teacher is then put into one as well, or into none."""
        return self.student_renderer.opens_thinking(conversation)

    def teacher_prompts(self, conversations: Sequence[Conversation]) -> list[Ids]:
        """What the teacher reads before it writes, in its own ids."""
        read = [(self.reader.teacher_reads(c), self.opens_thinking(c)) for c in conversations]
        return [self.teacher.renderer.prompt_ids(c, thinking=inside) for c, inside in read]

    def align_window(self, window: Sequence[Sequence[ReadPair | None]], on_policy: bool) -> list[AlignedBatch]:
        """The micro-batches of a window, samples of similar length together where the loss does not depend on it."""
        split_matters = len(self.lanes) > 1 or any(term.objective.balanced_with_ce for term in self.terms)
        together = self.args.num_generations if on_policy else 1
        found = []
        for batch in as_read(window) if split_matters else by_length(window, together):
            found.append(self.align([pair for _, pair in batch], on_policy))
            found[-1].places = [place for place, pair in batch if pair is not None]
        return found

    def align(self, pairs: Sequence[ReadPair | None], on_policy: bool) -> AlignedBatch:
        """One micro-batch of pairs, on the training device."""
        unscored = {Role.REASONING} if not self.args.score_reasoning else set()
        unscored |= {Role.TOOL_CALL} if not self.args.score_tool_calls else set()
        batch = align_pairs(
            pairs,
            pad_s=pad_id(self.student_renderer),
            pad_t=pad_id(self.teacher.renderer),
            on_policy=on_policy,
            unscored_roles=frozenset(unscored),
        )
        batch = batch.to(self.args.device)
        batch.asked = self.teacher.ask(batch.teacher, not self.same_vocabulary)  # answers come as the student works
        return batch

    def count_over_ranks(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Sum each count over all ranks; one call per window."""
        names = sorted(counts)
        local = torch.tensor([float(counts[n]) for n in names], dtype=torch.float64, device=self._reduce_device)
        return dict(zip(names, self.accelerator.reduce(local, "sum").tolist(), strict=True))

    @property
    def _reduce_device(self) -> torch.device:
        return self.args.device if self.args.device.type != "mps" else torch.device("cpu")

    def draw(self, what: str) -> float:
        """A uniform number in [0, 1) that depends on seed and step only: equal on all ranks and after a resume."""
        return random.Random(self.seed_for(what)).random()

    def seed_for(self, what: str) -> int:
        """A seed that depends on the run's seed, the step and `what`: equal on all ranks and after a resume."""
        return random.Random(f"{what}/{self.args.seed}/{self.state.global_step}").getrandbits(63)

    def row_seeds(self, what: str, window: Sequence[Sequence[Any]], per_row: int = 1) -> list[list[int]]:
        """For each micro-batch `per_row` seeds of each of its rows.

        They depend on the row's place in the window of all ranks, so not on how many ranks there are.
        """
        args = self.args
        places = row_places([len(b) for b in window], args.train_batch_size, args.process_index, args.world_size)
        base = self.seed_for(what)
        return [[row_seed(base, place, i) for place in batch for i in range(per_row)] for batch in places]

    def _watch_coverage(self, batches: Sequence[AlignedBatch]) -> None:
        """Log the alignment of a window, and stop if too little of it could be aligned."""
        totals: dict[str, float] = defaultdict(float)
        for batch in batches:
            for name, value in batch.stats.items():
                totals[name] += value
        totals["dropped_samples"] += sum(self.reader.take_dropped().values())
        totals["windows"] += 1
        totals["on_policy"] += batches[0].on_policy
        self._metrics.add(totals)
        written = totals["written"] - totals["excluded"]
        coverage = totals["covered"] / max(written, 1)
        if totals["written"] and not totals["tokens"]:
            logger.warning(
                "Step %d: none of the %d tokens that were written is scored.", self.state.global_step, totals["written"]
            )
        nothing = totals["written"] and not totals["tokens"]
        if (written or nothing) and coverage < self.args.min_coverage:
            raise AlignmentError(
                f"Only {coverage:.1%} of the {int(written)} tokens that were written in step {self.state.global_step} "
                f"could be aligned with the teacher's ({int(totals['tokens'])} are scored); min_coverage is "
                f"{self.args.min_coverage:.0%}. Look at the pair: a lossy normaliser on one side, text that the "
                "teacher's context cannot hold, or replies made of control tokens are the usual reasons."
            )

    # ---- one micro-batch ---------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The micro-batch's share of the window's loss, in nats per item."""
        with self.accelerator.autocast():  # around the heads as well: they run outside of the model's own forward
            if "lanes" in inputs:
                loss = self.lanes_loss(model, inputs["lanes"], inputs["weights"])
            else:
                loss = self.batch_loss(model, inputs["batch"])
        return (loss, {}) if return_outputs else loss

    @abstractmethod
    def batch_loss(self, model: torch.nn.Module, batch: AlignedBatch) -> Tensor:
        """Sum over the batch's items, each divided by the window's count: scalar, with gradient."""

    def hidden_at_rows(self, model: torch.nn.Module, side: PackedSide) -> Tensor:
        """The student's hidden state that predicts each scored token, [N_s, H_s], with gradient."""
        for read, hidden in self._read or ():
            if same_side(read, side):
                return hidden
        hidden = hidden_at_rows(model, side.input_ids, side.attention_mask, side.rows)
        if self._read is not None:
            self._read.append((side, hidden))
        return hidden

    def teacher_hidden(self, batch: AlignedBatch) -> Tensor:
        """The teacher's, [N_t, H_t]; computed once per batch."""
        if batch.teacher_hidden is None:
            batch.teacher_hidden = self.ask_teacher(batch)
        return batch.teacher_hidden

    def ask_teacher(self, batch: AlignedBatch) -> Tensor:
        """The teacher's hidden states, computed now."""
        return local(self.teacher, "This objective").hidden(batch.teacher)

    def teacher_logps(self, batch: AlignedBatch, temperature: float) -> Tensor:
        """Log-prob of each token of the teacher's reading, nats, [N_t]."""
        if batch.asked is not None:
            return batch.asked.result().text(not self.same_vocabulary).to(self.args.device)
        return self.logps(self.teacher_hidden(batch), batch.teacher, "teacher", temperature)

    def logps(self, hidden: Tensor, side: PackedSide, whose: str, temperature: float = 1.0) -> Tensor:
        """Log-prob of each written token, nats, [N], under the head of the "student" or the "teacher"."""
        head, stop_ids = self.student_head, self.pair.stop_s
        if whose == "teacher":
            head, stop_ids = local(self.teacher, "A log-prob of hidden states").head, self.pair.stop_t
        # With equal vocabularies the textbook compares the very id that was written, not the mass of the stop set.
        stop = torch.zeros_like(side.stop) if self.same_vocabulary else side.stop
        return token_logps(hidden, head, side.targets, stop, stop_ids, self.chunk_rows(), temperature)

    # ---- the terms of the loss ---------------------------------------------------------------------------------

    def requested_terms(self, auto: str, **defaults: Any) -> list[Term]:
        """The terms that `args.objective` asks for; `defaults` are options of `jsd` and `strict`."""
        requested: Any = self.args.objective
        entries: list[Any] = [requested] if isinstance(requested, str) else list(requested)
        entries = [{"name": one} if isinstance(one, str) else one for one in entries]
        named = [{**one, "name": auto} if one.get("name") == "auto" else one for one in entries]
        strict = {**defaults, "top_k": self.args.strict_top_k}
        return terms_of(named, self.pair, {"jsd": defaults, "strict": strict, "top_k": defaults})

    def term_counts(self, batches: Sequence[AlignedBatch]) -> dict[str, float]:
        """Over how many items of these batches each term is averaged."""
        return {term.name: sum(map(term.count, batches)) for term in self.terms}

    def terms_loss(self, terms: Sequence[Term], hidden_s: Tensor, batch: AlignedBatch) -> Tensor:
        """The batch's share of the weighted terms, each averaged over its own items."""
        assert batch.counts is not None
        loss = hidden_s.new_zeros(())
        scores = self.scores(hidden_s, batch)
        for term in terms:
            share = term.weight * self.accelerator.num_processes / max(batch.counts[term.name], 1.0)
            loss = loss + scores.loss(term, share, self._metrics.add_mean)
        return loss

    def scores(self, hidden_s: Tensor, batch: AlignedBatch) -> BatchScores:
        """What both models say about a batch, for objectives to ask."""
        student, teacher = self.student_renderer.vocabulary, self.teacher.renderer.vocabulary
        keywords: dict[str, Any] = dict(
            chunk_rows=self.chunk_rows,
            temperature=self.args.kd_temperature,
            stop_as_set=not self.same_vocabulary,
            references=None if self.references is None else self._reference_logps,
        )
        of_student = Reader.of(self.student_head, student, self.pair.stop_s)
        if batch.asked is not None:
            return ScoredBatch(batch.asked.result(), batch, hidden_s, None, of_student, None, **keywords)
        of_teacher = Reader.of(local(self.teacher, "A head").head, teacher, self.pair.stop_t)
        return BatchScores(batch, hidden_s, self.teacher_hidden(batch), of_student, of_teacher, **keywords)

    def _reference_logps(self, batch: AlignedBatch) -> tuple[Tensor, Tensor]:
        assert self.references is not None
        return reference_logps(self.references, batch, self.pair, not self.same_vocabulary, self.chunk_rows())

    def chunk_rows(self, few_columns: bool = False) -> int:
        """Rows of logits that exist at a time."""
        both, device = (self.pair.size_s, self.pair.size_t), self.args.device
        return self.args.rows_per_chunk or default_chunk_rows(*both, device, few_columns=few_columns)

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def train(self, *args: Any, **keywords: Any) -> Any:
        """The Trainer's own. A served teacher or engine that is gone leaves a checkpoint of the last whole step."""
        try:
            return super().train(*args, **keywords)
        except BaseException as error:
            for lane in self.lanes:
                lane.teacher.break_off()
            if isinstance(error, (TeacherUnavailable, RolloutsUnavailable)) and self.args.world_size == 1:
                folder = Path(self._get_output_dir(trial=None)) / f"checkpoint-{self.state.global_step}"
                if not (folder / "trainer_state.json").exists():
                    self._save_checkpoint(self.model_wrapped, None)
                raise type(error)(f"{error} It is {folder}.") from None
            raise

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's own, and the projectors of the objectives."""
        optimizer = super().create_optimizer(model)
        add_to_optimizer(optimizer, self.projectors)
        return optimizer

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be resumed."""
        described = [describe_teacher(lane.teacher) for lane in self.lanes]
        several = {lane.label: {**one, "weight": lane.weight} for lane, one in zip(self.lanes, described, strict=True)}
        return {
            "student": describe_model(self.student, self.student_renderer, weights=False),
            "teacher": several if len(several) > 1 else described[0],
            "objective": describe_objective(type(self).__name__, self.terms, self.args),
        }

    def save_extras(self, folder: Path) -> None:
        """The projectors."""
        if self.projectors and self.is_world_process_zero():
            save_projectors(folder, self.projectors)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_projectors(Path(checkpoint), self.projectors)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.restore(Path(checkpoint))

    def restore(self, checkpoint: Path) -> None:
        """Take up from `checkpoint` what the Trainer does not keep itself. Model and state are loaded already."""
        logged = [entry["num_tokens"] for entry in self.state.log_history if "num_tokens" in entry]
        self._metrics.num_tokens = logged[-1] if logged else 0.0

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Six times parameters times student tokens of the batch."""
        return 6 * self.student.num_parameters(exclude_embeddings=True) * inputs["batch"].student.input_ids.numel()

    # ---- evaluation --------------------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Bits per byte of the completions in the data, and the divergence on completions that the student writes now.

        `eval_loss` is the reverse KL in nats per byte of the student's own text: one meaning for both trainers and all
        objectives.
        """
        data = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(data, dict):
            parts = [self.evaluate(one, ignore_keys, f"{metric_key_prefix}_{name}") for name, one in data.items()]
            return {name: value for part in parts for name, value in part.items()}
        if data is None:
            raise ConfigError("There is nothing to evaluate on. Pass eval_dataset.")
        rank, world = self.args.process_index, self.args.world_size
        rows: Any = data
        samples = [to_sample(rows[i], where=f"evaluation row {i}") for i in range(rank, len(rows), world)]
        with gathered(self.student, *self.teacher_models()):
            measured = [(lane.weight, self._evaluate_samples(samples)) for lane in self.each_lane()]
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in mean_metrics(measured).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluator(self) -> Evaluator:
        """Evaluates the student as it is now, against this trainer's teacher."""
        return Evaluator(
            self.student, self.reader, self.teacher, self.pair, batch_size=self.args.per_device_eval_batch_size
        )

    def _evaluate_samples(self, samples: list[Sample]) -> dict[str, float]:
        """Metrics over all ranks' samples. Every rank samples with the same seeds at every evaluation."""
        evaluator = self.evaluator()
        reference = evaluator.on_reference([s for s in samples if s.reply is not None])
        columns = {f"reference/{n}": getattr(reference, n) for n in ("nats", "num_bytes")}
        if isinstance(self.teacher, ScoredTeacher):  # of which nobody can ask anything about new text
            return reference_metrics(self._totals(columns))
        written = evaluator.on_policy(
            [s.conversation for s in samples],
            self.sampler,
            max_new_tokens=self.args.max_completion_length,
            seed=self.args.seed,
        )
        self.reader.take_dropped()
        columns |= {n: getattr(written, n) for n in OnPolicyReport.columns()}
        return evaluation_metrics(self._totals(columns), whole_rows=self.teacher.level >= Level.HIDDEN)

    def _totals(self, columns: Mapping[str, Any]) -> dict[str, float]:
        return self.count_over_ranks({name: float(values.sum()) for name, values in columns.items()})

    # ---- logging -----------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's log, with this log interval's own metrics of all ranks."""
        if "loss" in logs:
            logs = {**logs, **self._metrics.take(lambda sums: self.count_over_ranks(with_all_names(sums)))}
            logs |= self.rollouts.take_metrics()
        super().log(logs, start_time)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write `README.md` into the output folder: teacher, student, dataset, method and versions."""
        if not self.is_world_process_zero():
            return
        student, teacher = self.student_renderer.vocabulary, self.teacher.renderer.vocabulary
        card = model_card(
            model_name=model_name or Path(str(self.args.output_dir)).name,
            student=finetuned_from or self.student.config._name_or_path,
            teacher=", ".join(lane.teacher.name for lane in self.lanes),
            dataset=dataset if isinstance(dataset, str) else ", ".join(dataset or []) or None,
            method=type(self).__name__.removesuffix("Trainer"),
            vocabulary_s=f"{student.kind}, {len(student)} rows",
            vocabulary_t=f"{teacher.kind}, {len(teacher)} rows",
            relation=student.explain_difference(teacher) or "the same table",
            versions=", ".join(f"{name} {version(name)}" for name in ("diglot", "transformers", "torch")),
            tags=[tags] if isinstance(tags, str) else tags,
        )
        card.save(Path(str(self.args.output_dir)) / "README.md")
