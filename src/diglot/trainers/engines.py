"""What is known from a rollout engine about the sampler and the trainer.

The engine samples from its own copy of the student: other kernels, other precision, weights of the last `sync`. What it
says about the ids that it sampled is compared with what the trainer's student says about them, each window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from diglot.comparisons import Batch
from diglot.errors import RolloutError
from diglot.heads import Head, token_logps
from diglot.rollouts import Completion, RolloutEngine
from diglot.trainers.ranks import reduce_device
from diglot.watching.metrics import StepMetrics

if TYPE_CHECKING:
    from diglot.rollouts.engine import Ids

FAR = 1.0
"""Nats, mean over a micro-batch: far beyond what rounding makes; other weights or another tokenizer do."""


class Rollouts:
    """The student's completions by an engine, and how far the engine's log-probs are from the student's.

    Every process calls each method at the same steps.
    """

    def __init__(
        self, engine: RolloutEngine, accelerator: Accelerator, metrics: StepMetrics, cap: float | None
    ) -> None:
        self.engine, self.accelerator, self.metrics = engine, accelerator, metrics
        self.cap = cap  # largest weight of a token by which the engine is made up for; None: it is not
        self._synced: int | None = None  # the step whose weights the engine has
        self._largest = 0.0

    def write(
        self, student: PreTrainedModel, step: int, prompts: Sequence[Ids], *, longest: int, seeds: Sequence[int]
    ) -> list[Completion]:
        """One completion for each prompt, by the student as it is now."""
        if self.engine.own_weights and self._synced != step:
            self.accelerator.wait_for_everyone()  # nobody has a request under way
            if self.accelerator.is_main_process:
                self.engine.sync(student)
            self.accelerator.wait_for_everyone()
            self._synced = step
        return self.engine.write(student, prompts, max_new_tokens=longest, seed=seeds)

    @torch.no_grad()
    def measure(self, batch: Batch, hidden: Tensor, head: Head, step: int) -> None:
        """Compare the engine's log-probs of a batch with the student's when it wrote; sets `batch.sampler_weight`.

        Args:
            hidden: `[N_s, H_s]`, of the weights that the engine has.

        Raises:
            RolloutError: the two are so far apart that the engine cannot have the student's weights.
        """
        said = batch.logp_sampler
        if said is None or batch.sampler_weight is not None or not len(said):
            return
        side, comparison = batch.student, batch.views[0].comparison
        none = torch.zeros_like(side.stop)  # the very id that was sampled, not the whole stop set
        rows, stop_ids = comparison.chunk_rows(), comparison.pair.stop_s
        own = token_logps(hidden.detach(), head, side.targets, none, stop_ids, rows)
        difference = own.float() - said.to(own.device)
        gap = difference.abs()
        if not torch.isfinite(gap).all():
            return  # of the student's own; the loss is no number then, and that is dealt with there
        _refuse(float(gap.mean()), step)
        self._largest = max(self._largest, float(gap.max()))
        self.metrics.add_mean("sampling/logp_gap_mean", float(gap.sum()), len(gap))
        if self.cap is not None:
            ratio = difference.exp()
            batch.sampler_weight = ratio.clamp(max=self.cap)
            self.metrics.add_mean("sampling/weight_clipped", float((ratio > self.cap).sum()), len(gap))

    def take_metrics(self) -> dict[str, float]:
        """What sums cannot hold, over all ranks since the last call."""
        if not self.engine.own_weights:
            return {}
        mine = torch.tensor([self._largest], device=reduce_device(self.accelerator.device))
        self._largest = 0.0
        return {"sampling/logp_gap_max": float(self.accelerator.gather(mine).max())}


def _refuse(mean: float, step: int) -> None:
    if mean <= FAR:
        return
    raise RolloutError(
        f"In step {step} the engine's log-probs of its own samples are {mean:.2f} nats a token away from the "
        f"student's, expected less than {FAR:.0f}: it does not have the student's weights, or reads other tokens. "
        "Look at its log for weights that were not loaded, at whether another run uses it, and at its --logprobs-mode; "
        "restart it with the student. The optimizer was not run."
    )
