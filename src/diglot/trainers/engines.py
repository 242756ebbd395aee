"""What is known from a rollout engine about the sampler and the trainer.

The engine samples from its own copy of the student: other kernels, other precision, weights of the last `sync`; and
what is written ahead is written by the student of some steps ago. What the writer said about the ids that it sampled
is compared with what the trainer's student says about them, each window.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from diglot.arrays import Ids
from diglot.batches import pad_id
from diglot.comparisons import Batch, Comparison
from diglot.errors import RolloutError
from diglot.heads import Head, token_logps
from diglot.options import DistillationConfig
from diglot.rollouts import Completion, RolloutEngine
from diglot.rollouts.logps import with_logps
from diglot.trainers.ranks import reduce_device
from diglot.watching.metrics import StepMetrics

logger = logging.getLogger(__name__)

FAR = 1.0
"""Nats, mean over a micro-batch: far beyond what rounding makes; other weights or another tokenizer do."""


class Rollouts:
    """The student's completions by an engine, and how far the writer's log-probs are from the student's.

    Every process calls each method at the same steps.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        accelerator: Accelerator,
        metrics: StepMetrics,
        args: DistillationConfig,
        comparison: Comparison,
        head: Head,
    ) -> None:
        self.engine, self.accelerator, self.metrics = engine, accelerator, metrics
        self.comparison, self.head = comparison, head
        # The largest weight of a token by which the writer is made up for; None: it is not.
        corrected, most = args.vllm_importance_sampling_correction, args.vllm_importance_sampling_clip_max
        self.cap = most if corrected else None
        self._speaks = engine.own_weights or bool(args.rollout_ahead)  # does a writer say log-probs of its own?
        self._at_a_time = args.per_device_train_batch_size
        self._synced: int | None = None  # the step whose weights the engine has
        self._largest = 0.0
        self._later = ThreadPoolExecutor(1, thread_name_prefix="diglot-ahead")
        self._under_way: Future[list[Completion]] | None = None
        if args.rollout_ahead and not engine.elsewhere:
            logger.warning(
                "rollout_ahead=%d only costs here: the completions are written where the student is trained, so "
                "nothing is done meanwhile. It gains time with vllm_mode='server' alone.",
                args.rollout_ahead,
            )

    def write(
        self, student: PreTrainedModel, step: int, prompts: Sequence[Ids], *, longest: int, seeds: Sequence[int]
    ) -> list[Completion]:
        """One completion for each prompt, by the student as it is now."""
        self._sync(student, step)
        return self.engine.write(student, prompts, max_new_tokens=longest, seed=seeds)

    def write_later(
        self, student: PreTrainedModel, step: int, prompts: Sequence[Ids], *, longest: int, seeds: Sequence[int]
    ) -> Future[list[Completion]]:
        """The same for later, with what the student says about them now: an engine elsewhere writes meanwhile."""
        self._sync(student, step)
        write = partial(self.engine.write, student, prompts, max_new_tokens=longest, seed=seeds)
        if self.engine.elsewhere:
            self._under_way = self._later.submit(write)
            return self._under_way
        written = write()
        if not self.engine.own_weights:
            sizes = dict(at_a_time=self._at_a_time, chunk_rows=self.comparison.chunk_rows())
            written = with_logps(student, self.head, prompts, written, pad_id(self.comparison.reader.student), **sizes)
        done: Future[list[Completion]] = Future()
        done.set_result(written)
        return done

    def break_off(self) -> None:
        """Wait for nothing that is under way."""
        if self._under_way is not None and not self._under_way.done():
            self.engine.break_off()

    def _sync(self, student: PreTrainedModel, step: int) -> None:
        """Renew the weights of an engine that has its own, if it has not those of this step."""
        if self.engine.own_weights and self._synced != step:
            if self._under_way is not None:
                wait([self._under_way])
            self.accelerator.wait_for_everyone()  # nobody has a request under way
            if self.accelerator.is_main_process:
                self.engine.sync(student)
            self.accelerator.wait_for_everyone()
            self._synced = step

    @torch.no_grad()
    def measure(self, batch: Batch, hidden: Tensor, step: int) -> None:
        """Compare the writer's log-probs of a batch with the student's now; sets `batch.sampler_weight`.

        Args:
            hidden: `[N_s, H_s]`, of the weights that the engine has, or of those that came after them.

        Raises:
            RolloutError: the two are so far apart that the engine cannot have the student's weights.
        """
        logp_sampler = batch.logp_sampler
        if logp_sampler is None or batch.sampler_weight is not None or not len(logp_sampler):
            return
        side, comparison = batch.student, batch.views[0].comparison
        none = torch.zeros_like(side.stop)  # the very id that was sampled, not the whole stop set
        rows, stop_ids = comparison.chunk_rows(), comparison.pair.stop_s
        own = token_logps(hidden.detach(), self.head, side.targets, none, stop_ids, rows)
        difference = own.float() - logp_sampler.to(own.device)
        gap = difference.abs()
        if not torch.isfinite(gap).all():
            return  # of the student's own; the loss is no number then, and that is dealt with there
        if self.engine.own_weights:
            _refuse(float(gap.mean()), step)
        self._largest = max(self._largest, float(gap.max()))
        self.metrics.add_mean("sampling/logp_gap_mean", float(gap.sum()), len(gap))
        if self.cap is not None:
            ratio = difference.exp()
            batch.sampler_weight = ratio.clamp(max=self.cap)
            self.metrics.add_mean("sampling/weight_clipped", float((ratio > self.cap).sum()), len(gap))

    def take_metrics(self) -> dict[str, float]:
        """What sums cannot hold, over all ranks since the last call."""
        if not self._speaks:
            return {}
        mine = torch.tensor([self._largest], device=reduce_device(self.accelerator.device))
        self._largest = 0.0
        return {"sampling/logp_gap_max": float(self.accelerator.gather(mine).max())}


def _refuse(mean: float, step: int) -> None:
    if mean <= FAR:
        return
    raise RolloutError(
        f"In step {step} the engine's log-probs of its own samples are {mean:.2f} nats a token away from the "
        f"student's, expected less than {FAR:.0f}: it does not have the student's weights, or reads other tokens (or, "
        "with rollout_ahead, the learning rate is so high that they are others by now). "
        "Look at its log for weights that were not loaded, at whether another run uses it, and at its --logprobs-mode; "
        "restart it with the student. The optimizer was not run."
    )
