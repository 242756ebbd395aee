"""What GKD and MiniLLM share: texts, read by the student and by each teacher, and a sum of weighted terms.

One optimizer step works on one *window*: all micro-batches of its accumulation steps. The window is where completions
are sampled (in one call), where each comparison reads and aligns them, and where the items over which each term is
averaged are counted, over all ranks. What is left for `compute_loss` is a forward pass of the student and a sum.
"""

from __future__ import annotations

import logging
import random
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from diglot.arrays import Ids
from diglot.batches import PackedSide, pad_id
from diglot.batches.lengths import as_read, by_length
from diglot.checkpoints.manifest import describe_run
from diglot.checkpoints.saving import Checkpoints, StopOnSignal, write_options
from diglot.comparisons import Batch, Comparison, Term, Texts, View, check_options, make_batch, scores_of
from diglot.comparisons.build import complete, describe, load_student, mean_metrics, prepare_comparisons, routes
from diglot.comparisons.comparison import read_completions
from diglot.comparisons.counts import set_counts
from diglot.comparisons.precision import check_trainable, to_train
from diglot.comparisons.projectors import (
    add_to_optimizer,
    load_projectors,
    make_projectors,
    same_everywhere,
    save_projectors,
)
from diglot.comparisons.rows import checked_rows, rows_named
from diglot.data import Sample, collate_samples, to_sample
from diglot.errors import ConfigError, RolloutsUnavailable, TeacherUnavailable
from diglot.evaluation import Evaluator, OnPolicyReport
from diglot.heads import Head, even_passes, gathered, hidden_at_rows, keep_after_forward
from diglot.objectives import Level
from diglot.options import DistillationConfig
from diglot.options.refused import RefusingTrainer, check_arguments
from diglot.phases import phase as working
from diglot.rendering import Conversation, Renderer
from diglot.rollouts import Completion, TransformersSampler
from diglot.rollouts.ahead import Ahead, Row, Waiting, Window, answered, rows_of
from diglot.rollouts.connect import make_engine
from diglot.teachers.adapter import AdapterOff, has_own_model
from diglot.teachers.scored import ScoredTeacher
from diglot.trainers.engines import Rollouts
from diglot.trainers.ranks import (
    check_devices,
    check_wrapping,
    place_frozen,
    row_places,
    row_seed,
    sum_over_ranks,
    with_all_names,
)
from diglot.watching.card import write_card
from diglot.watching.coverage import watch_coverage
from diglot.watching.finite import FiniteSteps
from diglot.watching.metrics import StepMetrics, evaluation_metrics, reference_metrics
from diglot.watching.observing import Observer
from diglot.watching.recording import RecordCallback, with_numbers

logger = logging.getLogger(__name__)


class DistillationTrainer(RefusingTrainer):
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
        # Before the Trainer's own setup, which makes the output folder: what cannot work leaves nothing behind.
        self.args = args = args if args is not None else self.config_class(output_dir="diglot-output")
        check_arguments(args, self.config_class, compute_metrics)
        check_devices(args)
        own, self.student_renderer = load_student(model, processing_class, args, frozen=peft_config is not None)
        compared = prepare_comparisons(own, self.student_renderer, teacher_model, teacher_processing_class, args)
        engine = make_engine(args, self.student_renderer, self.sampler_for(self.student_renderer))
        terms = [self.terms(one) for one in compared]
        check_options(args, [term for of_one in terms for term in of_one])
        self.comparisons = [complete(one, of_one, own, args) for one, of_one in zip(compared, terms, strict=True)]
        self.imitations: list[Comparison] = []  # of texts that no teacher judges
        self.dataset_names: list[str] = []  # for the model card
        student = to_train(own, peft_config, args)
        check_trainable(student, args, optimizers[0])
        for one in self.comparisons:
            if isinstance(one.teacher, AdapterOff):
                one.teacher.follow(student)
        train_dataset, eval_dataset = self.usable_rows(train_dataset, eval_dataset)
        super().__init__(
            model=student,
            args=args,
            data_collator=data_collator or collate_samples,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self.student_renderer.tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            compute_loss_func=self.batch_loss,  # never called: losses are shares of the window's, not divided once more
        )
        check_wrapping(self.accelerator)
        self.student_head = Head.of(self.student)
        self.student_head.verify(self.student)
        self.projectors = self._to_device()
        self.metrics = StepMetrics()
        self.stopping: StopOnSignal | None = None
        self.rollouts = Rollouts(engine, self.accelerator, self.metrics, args, self.comparisons[0], self.student_head)
        self.ahead = Ahead(args.rollout_ahead * args.steps_per_window, args.process_index)
        self.finite = FiniteSteps(self.accelerator, args, self.metrics)
        self.checkpoints = Checkpoints(self.accelerator, args, self.identity)
        self.observer = Observer(args, self.comparisons, self.student_head, self.metrics, self.accelerator.autocast)
        self.add_callback(RecordCallback(self._observe, lambda: self.observer.drift.history))
        with_numbers(self)
        for one in self.comparisons if self.is_world_process_zero() else ():
            logger.info("%s: %s", one.label, describe(one))

    def _to_device(self) -> dict[str, torch.nn.Parameter]:
        """Bring what the comparisons hold to where the student is; the objectives' trainable parameters by name."""
        parameters: dict[str, torch.nn.Parameter] = {}
        self.comparisons = [replace(one, pair=one.pair.to(self.args.device)) for one in self.comparisons]
        for one in self.comparisons:
            for held in (one.teacher, *(one.references or ())):
                place_frozen(held, self.accelerator)
            for term in one.terms:
                term.objective.to(self.args.device)
            own = make_projectors(one.terms, self.student_head, getattr(one.teacher, "head", None))
            parameters |= {n if one is self.comparisons[0] else f"{one.label}/{n}": p for n, p in own.items()}
        same_everywhere(parameters, sharded=self.is_fsdp_enabled)
        return parameters

    @property
    def student(self) -> PreTrainedModel:
        """The model in training, without the wrappers of data parallelism."""
        inner: PreTrainedModel = self.accelerator.unwrap_model(self.model)
        return inner

    @property
    def _whole_model(self) -> torch.nn.Module:
        """The same with them."""
        assert self.model is not None
        return self.model

    def teacher_models(self) -> list[PreTrainedModel]:
        """The teachers' models that are in this process beside the student's."""
        held = [one.teacher for one in self.comparisons]
        return [one.model for one in held if has_own_model(one)]

    # ---- what a method says ------------------------------------------------------------------------------------

    @abstractmethod
    def terms(self, comparison: Comparison) -> list[Term]:
        """The terms of the loss with one teacher; called before the Trainer's own setup."""

    @abstractmethod
    def texts(self, window: Window) -> Texts:
        """Who writes, and what each comparison reads of it."""

    def usable_rows(self, train: Any, evaluation: Any) -> tuple[Any, Any]:
        """The datasets with the rows that can be used, each read once before the Trainer's own setup."""
        return checked_rows(self.comparisons, self.args, train, evaluation)

    def items(self, view: View) -> Mapping[str, float]:
        """Over how many items of a micro-batch each term is averaged."""
        return view.items()

    def student_writes_at(self, step: int) -> bool:
        """Is it the student that writes the texts of this step?"""
        return True

    # ---- one window: texts, read, aligned, counted ---------------------------------------------------------------

    def prepare(self, window: Window) -> list[Batch]:
        """The micro-batches of one optimizer step: texts as every teacher reads them, and each term's count.

        Samples of similar length share a micro-batch where the loss does not depend on it.
        """
        routed = routes(self.comparisons, [sample for batch in window for sample in batch])
        texts = self.texts(window)
        self._write_ahead()
        first = [[next((pair for pair in read if pair), None) for read in batch] for batch in texts.reads]
        together = self.args.num_generations if texts.on_policy else 1
        split = as_read(first) if self._split_matters else by_length(first, together)
        reads = [read for batch in texts.reads for read in batch]
        batches = []
        for places in ([place for place, _ in batch] for batch in split):
            origin = dict(on_policy=texts.on_policy, from_data=texts.from_data, by_all=texts.by_all and not routed)
            batches.append(make_batch(self.comparisons, [reads[place] for place in places], places, **origin))
        set_counts(batches, self.items, self.count_over_ranks, routed)
        return batches

    @property
    def _split_matters(self) -> bool:
        terms = [term for one in self.comparisons for term in one.terms]
        return len(self.comparisons) > 1 or any(term.objective.depends_on_split for term in terms)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The micro-batch's share of the window's loss, in nats per item."""
        with self.accelerator.autocast():  # around the heads as well: they run outside of the model's own forward
            loss = self.batch_loss(model, inputs["batch"])
        return (loss, {}) if return_outputs else loss

    def batch_loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """The student is run once; every term pulls what it needs of both models, and is divided by its own count."""
        total, world = torch.zeros((), device=self.args.device), self.accelerator.num_processes
        for part in batch.parts:
            hidden = self.hidden_at_rows(model, part.student)
            self.rollouts.measure(part, hidden, self.state.global_step)
            total = total + hidden.sum() * 0.0  # a rank with nothing to compare takes part in the backward pass too
            with even_passes(*self.teacher_models()):
                for view in part.views:
                    scores = scores_of(part, view, hidden, self.student_head)
                    for term in view.comparison.terms:
                        share = view.weight * term.weight * world / max(view.counts[term.name], 1.0)
                        loss, metrics = term.objective.loss(view.plans[term.name], scores, share)
                        total = total + loss
                        self.metrics.add_values(metrics, term.logged)
                    view.release()  # the window's other micro-batches need the memory
        return total

    def hidden_at_rows(self, model: torch.nn.Module, side: PackedSide) -> Tensor:
        """The student's hidden state that predicts each scored token, [N_s, H_s], with gradient."""
        host = side.host_ids, side.host_rows
        return hidden_at_rows(model, side.input_ids, side.attention_mask, side.rows, host)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The Trainer's own. Streamed rows are read by every rank, which takes its own: samples are no tensors that
        one rank could send to the others."""
        if isinstance(self.train_dataset, IterableDataset):
            self.accelerator.dataloader_config.dispatch_batches = False
        return super().get_train_dataloader()

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Batch]], int | None]:
        """All micro-batches of one optimizer step, ready for `compute_loss`."""
        keep_after_forward(self.student, self.student_head.module)
        window = self.ahead.read(epoch_iterator, num_batches)
        if not window:
            return [], None
        self.finite.rows = [sample.where for batch in window for sample in batch]
        for projector in self.projectors.values():
            projector.grad = None  # the Trainer clears the gradients of its model only
        step = self.state.global_step
        with self.accelerator.autocast(), rows_named(self.comparisons, window):  # the model in training writes, rewards
            batches = self.prepare(window)
        dropped = sum(sum(one.reader.take_dropped().values()) for one in self.comparisons)
        watch_coverage(batches, dropped, self.metrics, step=step, min_coverage=self.args.min_coverage)
        self.observer.window(batches, self._whole_model, step, self.state.logging_steps)
        data = self.eval_dataset or self.train_dataset
        self.observer.drifts(batches, step, self.state.logging_steps, data, self.evaluator(self.observer.comparison))
        return [{"batch": batch} for batch in batches], int(sum(batch.scored for batch in batches))

    # ---- what the student writes ---------------------------------------------------------------------------------

    def student_writes(self, window: Window) -> Texts:
        """The student writes `num_generations` completions for each prompt of a window in one call, or has done it."""
        step = self.state.global_step
        rows = self._rows(window, step)
        conversations, prompts, seeds = answered(rows)
        waited = self.ahead.take(step, prompts)
        with gathered(self.student):  # also where there is nothing to write: other ranks gather too
            written, of_step = waited or (self.complete(conversations, prompts, seeds), step)
        if self.ahead.steps:
            self.metrics.add_mean("sampling/steps_old", step - of_step, 1)
        return Texts(read_completions(self.comparisons, rows, written), on_policy=True)

    def _write_ahead(self) -> None:
        """The student writes for a window to come, if it is to write for that one."""
        step, longest = self.state.global_step, self.args.max_completion_length
        turn, window = self.ahead.due(step, self.state.max_steps)
        if window is None or not self.student_writes_at(turn):
            return
        _, prompts, seeds = answered(self._rows(window, turn, counted=False))
        with gathered(self.student):
            later = self.rollouts.write_later(self.student, step, prompts, longest=longest, seeds=seeds)
        self.ahead.put(turn, Waiting(prompts, step, later))

    def _rows(self, window: Window, step: int, *, counted: bool = True) -> list[list[Row]]:
        """What is to be written for the window of a step."""
        seeds = self.row_seeds("rollouts", window, self.args.num_generations, step)
        return rows_of(self.comparisons[0].reader, window, seeds, self.args.max_completion_length, counted=counted)

    def complete(
        self, conversations: Sequence[Conversation], prompts: Sequence[Ids], seeds: Sequence[int]
    ) -> list[Completion]:
        """One completion for each of the student's prompts, by the student as it is now or an engine's copy of it."""
        if self.rollouts.engine.own_weights:
            return self._write(prompts, seeds)
        return [Completion(ids) for ids in self.sample(conversations, prompts, seeds)]

    def sample(self, conversations: Sequence[Conversation], prompts: Sequence[Ids], seeds: Sequence[int]) -> list[Ids]:
        """The same by the student itself."""
        return [one.ids for one in self._write(prompts, seeds)]

    def _write(self, prompts: Sequence[Ids], seeds: Sequence[int]) -> list[Completion]:
        longest, step = self.args.max_completion_length, self.state.global_step
        return self.rollouts.write(self.student, step, prompts, longest=longest, seeds=seeds)

    def sampler_for(self, renderer: Renderer) -> TransformersSampler:
        """A sampler for one of the two models, at the temperature of `args`."""
        args = self.args
        return TransformersSampler(renderer.stop_ids, pad_id(renderer), args.temperature, args.top_p, args.top_k)

    @property
    def sampler(self) -> TransformersSampler:
        """The student's sampler."""
        return self.sampler_for(self.student_renderer)

    @property
    def own_sampler(self) -> TransformersSampler:
        """The same without temperature, nucleus and top-k: only from its own draws a divergence can be estimated."""
        return TransformersSampler(self.student_renderer.stop_ids, pad_id(self.student_renderer))

    # ---- chance and ranks ----------------------------------------------------------------------------------------

    def draw(self, what: str, step: int | None = None) -> float:
        """A uniform number in [0, 1) that depends on seed and step (default: this one), on all ranks and on resume."""
        return random.Random(self.seed_for(what, step)).random()

    def seed_for(self, what: str, step: int | None = None) -> int:
        """A seed that depends on the run's seed, the step and `what`: equal on all ranks and after a resume."""
        at = self.state.global_step if step is None else step
        return random.Random(f"{what}/{self.args.seed}/{at}").getrandbits(63)

    def row_seeds(
        self, what: str, window: Sequence[Sequence[Any]], per_row: int = 1, step: int | None = None
    ) -> list[list[int]]:
        """For each micro-batch `per_row` seeds of each of its rows.

        They depend on the row's place in the window of all ranks, so not on how many ranks there are.
        """
        args = self.args
        places = row_places([len(b) for b in window], self._train_batch_size, args.process_index, args.world_size)
        base = self.seed_for(what, step)
        return [[row_seed(base, place, i) for place in batch for i in range(per_row)] for batch in places]

    def count_over_ranks(self, counts: Mapping[str, Any]) -> dict[str, float]:
        """Sum each count, or array of counts, over all ranks; every rank calls it at the same place."""
        return sum_over_ranks(self.accelerator, {name: float(np.sum(count)) for name, count in counts.items()})

    # ---- the optimizer's step ------------------------------------------------------------------------------------

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As `Trainer.training_step`; the loss is noted for `_get_grad_norm`."""
        return self.finite.saw(inputs["batch"], super().training_step(model, inputs, num_items_in_batch))

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """The norm before the optimizer's step: the place to refuse it."""
        norm: Any = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        own = self.projectors.values()
        return self.finite.check(norm, self.state.global_step, (*model.parameters(), *own), own)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's own, and the projectors of the objectives."""
        optimizer = super().create_optimizer(model)
        add_to_optimizer(optimizer, self.projectors)
        return optimizer

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Six times parameters times student tokens of the batch."""
        tokens: int = inputs["batch"].student.input_ids.numel()
        return 6 * self.student.num_parameters(exclude_embeddings=True) * tokens

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As `Trainer.train`; resumes from whole checkpoints of this run only, and saves where the run must stop.

        Raises:
            CheckpointError: see `Checkpoints.find`.
            StoppedError: SIGTERM or SIGINT came; a checkpoint was saved.
            TeacherUnavailable, RolloutsUnavailable: a server is gone; the last whole step was saved.
        """
        check_devices(self.args)  # a script may have set others since
        self.checkpoints.described()
        chosen, watch = self.checkpoints.find(resume_from_checkpoint), StopOnSignal(self.accelerator)
        self.add_callback(watch)
        self.stopping = watch
        try:
            with watch.listening():
                done = super().train(chosen, trial, ignore_keys_for_eval)
        except BaseException as error:
            for one in self.comparisons:
                one.teacher.break_off()
            self.rollouts.break_off()
            if isinstance(error, (TeacherUnavailable, RolloutsUnavailable)) and self.args.world_size == 1:
                folder = Path(self._get_output_dir(trial=None)) / f"checkpoint-{self.state.global_step}"
                if not (folder / "trainer_state.json").exists():
                    self._save_checkpoint(self.model_wrapped, None)
                raise type(error)(f"{error} It is {folder}.") from None
            raise
        finally:
            self.ahead.drop()
            self.remove_callback(watch)
        if watch.stopped:
            raise watch.error(self.state.global_step, self.args.output_dir)
        return done

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be resumed."""
        return describe_run(type(self).__name__, self.student, self.comparisons, self.args)

    def _get_output_dir(self, trial: Any) -> str:
        """Where checkpoints go: beside their place while one is being written."""
        beside = self.checkpoints.beside
        return str(beside) if beside is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """The Trainer's checkpoint and the extras, as one folder that is whole or not there."""
        run = Path(super()._get_output_dir(trial))
        with self.checkpoints.saving(run, self.state) as made:
            self.save_extras(made)
            super()._save_checkpoint(model, trial)
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(run / f"checkpoint-{self.state.global_step}"))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not before the checkpoint is in its place."""

    def save_extras(self, folder: Path) -> None:
        """Write into a checkpoint what the Trainer does not keep itself; on every rank."""
        if self.projectors and self.is_world_process_zero():
            save_projectors(folder, self.projectors)
        if not self.args.save_only_model:
            self.ahead.save(folder, self.state.global_step)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student so that the folder does not load before all of it is there."""
        if _internal_call:
            return super().save_model(output_dir, _internal_call=True)
        target, save = Path(str(output_dir or self.args.output_dir)), super().save_model
        self.checkpoints.save_model(target, lambda folder: save(folder, _internal_call=True))
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The Trainer's own, with the options as JSON instead of a pickle."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            options: dict[str, Any] = self.args.to_dict()  # type: ignore[no-untyped-call]
            write_options(Path(str(output_dir or self.args.output_dir)), options)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_projectors(Path(checkpoint), self.projectors)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.restore(Path(checkpoint))

    def restore(self, checkpoint: Path) -> None:
        """Take up from `checkpoint` what the Trainer does not keep itself. Model and state are loaded already."""
        logged = [entry["num_tokens"] for entry in self.state.log_history if "num_tokens" in entry]
        self.metrics.num_tokens = logged[-1] if logged else 0.0
        self.ahead.restore(checkpoint)

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Bits per byte of the completions in the data, and the divergence on completions that the student writes now.

        It writes from its own distribution, whatever `temperature`, `top_p` and `top_k` training samples with.

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
        with gathered(self.student, *self.teacher_models()), self.accelerator.autocast():
            measured = [(one.weight, self._evaluate_samples(one, samples)) for one in self.comparisons]
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in mean_metrics(measured).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluator(self, comparison: Comparison | None = None) -> Evaluator:
        """Evaluates the student as it is now, against one teacher, by default the first."""
        one, size = comparison or self.comparisons[0], self.args.per_device_eval_batch_size
        return Evaluator(self.student, one.reader, one.teacher, one.pair, batch_size=size)

    def _evaluate_samples(self, comparison: Comparison, samples: list[Sample]) -> dict[str, float]:
        """Metrics over all ranks' samples. Every rank samples with the same seeds at every evaluation."""
        evaluator = self.evaluator(comparison)
        reference = evaluator.on_reference([s for s in samples if s.reply is not None])
        columns = {f"reference/{n}": getattr(reference, n) for n in ("nats", "num_bytes")}
        if isinstance(comparison.teacher, ScoredTeacher):  # of which nobody can ask anything about new text
            return reference_metrics(self.count_over_ranks(columns))
        written = evaluator.on_policy(
            [s.conversation for s in samples],
            self.own_sampler,
            max_new_tokens=self.args.max_completion_length,
            seed=self.args.seed,
        )
        comparison.reader.take_dropped()
        columns |= {n: getattr(written, n) for n in OnPolicyReport.columns()}
        return evaluation_metrics(self.count_over_ranks(columns), whole_rows=comparison.teacher.level >= Level.HIDDEN)

    # ---- logging -------------------------------------------------------------------------------------------------

    def _observe(self, phase: str) -> None:
        """A few fixed prompts, before the first step and after the last one."""
        if self.stopping is not None and self.stopping.stopped:  # somebody waits for the end; the run goes on later
            return
        data = self.eval_dataset or self.train_dataset
        evaluator = self.evaluator(self.observer.comparison)
        with working(f"The student answers fixed prompts, {phase} training"), self.accelerator.autocast():
            self.observer.fixed(phase, self.state.global_step, self._whole_model, data, evaluator, self.own_sampler)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's log, with this log interval's own metrics of all ranks."""
        if "loss" in logs:
            for cache in (one.cache for one in self.comparisons if one.cache is not None):
                for name, count in zip(("hits", "misses"), cache.take_counts(), strict=True):
                    self.metrics.add_count(f"teacher/cache_{name}", count)
            logs = {**logs, **self.metrics.take(lambda sums: self.count_over_ranks(with_all_names(sums)))}
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
        """Write `README.md` into the output folder: student, teachers, objective, data, results, citation."""
        if not self.is_world_process_zero():
            return
        method, base = type(self).__name__.removesuffix("Trainer"), finetuned_from or self.student.config._name_or_path
        facts = (self.comparisons, method, base, self.student, self.train_dataset, self.args)
        name, data = self.hub_model_id or model_name, dataset or self.dataset_names
        write_card(Path(str(self.args.output_dir)), *facts, name, data, tags, language, license)
