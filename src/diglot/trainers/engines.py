"""From options to a rollout engine, and what is known from it about the sampler and the trainer.

The engine samples from its own copy of the student: other kernels, other precision, weights of the last `sync`. What it
says about the ids that it sampled is compared with what the trainer's student says about them, each window.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from diglot.comparisons import Batch
from diglot.errors import ConfigError, RolloutError
from diglot.heads import Head, token_logps
from diglot.http.address import checked_address
from diglot.options import DistillationConfig
from diglot.rendering import Renderer
from diglot.rollouts import Completion, RolloutEngine, TransformersSampler
from diglot.trainers.ranks import reduce_device
from diglot.watching.metrics import StepMetrics

if TYPE_CHECKING:
    from diglot.rollouts.engine import Ids
    from diglot.rollouts.vllm_wire import Sampling
    from diglot.rollouts.weights import WeightsFolder

FAR = 1.0
"""Nats, mean over a micro-batch: far beyond what rounding makes; other weights or another tokenizer do."""


def make_engine(args: DistillationConfig, renderer: Renderer, sampler: TransformersSampler) -> RolloutEngine:
    """The engine that the options name.

    Raises:
        ConfigError: a mode that cannot run here, an address that cannot be used, or packages that are missing.
        RolloutError: a server that is not the student's.
    """
    if not args.use_vllm:
        return sampler
    from diglot.rollouts.vllm_wire import Sampling
    from diglot.rollouts.weights import WeightsFolder

    place = args.vllm_weights_dir or str(Path(str(args.output_dir)) / "vllm-weights")
    if Path(place).exists() and not Path(place).is_dir():
        raise ConfigError(f"vllm_weights_dir={place!r} is not allowed: it must be a folder, and it is a file.")
    sampling = Sampling(renderer.stop_ids, args.temperature, args.top_p, args.top_k)
    weights = WeightsFolder(Path(place))
    if args.vllm_mode == "colocate":
        return _colocated(args, sampling, weights)
    from diglot.rollouts.vllm_server import KEY_VARIABLE, VLLMServer

    url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
    address = checked_address(url, "vllm_server_base_url", KEY_VARIABLE)
    limits = dict(max_length=args.max_length, timeout=args.vllm_server_timeout)
    return VLLMServer.connect(address, renderer, sampling, weights, **limits)  # type: ignore[arg-type]


def _colocated(args: DistillationConfig, sampling: Sampling, weights: WeightsFolder) -> RolloutEngine:
    from diglot.rollouts.vllm_colocate import ColocatedVLLM

    if args.world_size > 1:
        raise ConfigError(
            f"vllm_mode='colocate' runs in one process, and there are {args.world_size}. Choose vllm_mode='server'."
        )
    dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    options: dict[str, Any] = {"gpu_memory_utilization": args.vllm_gpu_memory_utilization}
    if args.max_length is not None:
        options["max_model_len"] = args.max_length
    return ColocatedVLLM(sampling, weights, options, dtype)


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
