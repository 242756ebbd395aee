"""From options to a rollout engine, and what is known from it about the sampler and the trainer.

The engine samples from its own copy of the student: other kernels, other precision, weights of the last `sync`. What it
says about the ids that it sampled is compared with what the trainer's student says about them, each window.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diglot.batches import AlignedBatch
from diglot.errors import ConfigError, RolloutError
from diglot.heads import token_logps
from diglot.rendering import Renderer
from diglot.rollouts import Completion, RolloutEngine, TransformersSampler
from diglot.teachers.address import checked_address
from diglot.trainers.config import DistillationConfig

if TYPE_CHECKING:
    from diglot.rollouts.engine import Ids
    from diglot.rollouts.vllm_wire import Sampling
    from diglot.rollouts.weights import WeightsFolder
    from diglot.trainers.base import DistillationTrainer

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
        raise ConfigError(f"vllm_weights_dir={place!r} cannot work: it must be a folder, and it is a file.")
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
    """The completions of `trainer`'s student, by its engine."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer
        sampler = trainer.sampler_for(trainer.student_renderer)
        self.engine = make_engine(trainer.args, trainer.student_renderer, sampler)
        self._synced: int | None = None  # the step whose weights the engine has
        self._largest = 0.0

    def write(self, prompts: Sequence[Ids], seed: int | Sequence[int]) -> list[Completion]:
        """One completion for each prompt, by the student as it is now. Every rank calls it at the same steps."""
        trainer = self.trainer
        self._sync()
        longest = trainer.args.max_completion_length
        return self.engine.write(trainer.student, prompts, max_new_tokens=longest, seed=seed)

    def _sync(self) -> None:
        trainer, step = self.trainer, self.trainer.state.global_step
        if not self.engine.own_weights or self._synced == step:
            return
        trainer.accelerator.wait_for_everyone()  # nobody has a request under way
        if trainer.is_world_process_zero():
            self.engine.sync(trainer.student)
        trainer.accelerator.wait_for_everyone()
        self._synced = step

    @torch.no_grad()
    def measure(self, batch: AlignedBatch, hidden: Tensor) -> None:
        """Compare the engine's log-probs of a batch with the student's when it wrote; sets `batch.sampler_weight`.

        Args:
            hidden: `[N_s, H_s]`, of the weights that the engine has.

        Raises:
            RolloutError: the two are so far apart that the engine cannot have the student's weights.
        """
        said = batch.logp_sampler
        if said is None or batch.sampler_weight is not None or not len(said):
            return
        trainer, side = self.trainer, batch.student
        none = torch.zeros_like(side.stop)  # the very id that was sampled, not the whole stop set
        own = token_logps(
            hidden.detach(), trainer.student_head, side.targets, none, trainer.pair.stop_s, trainer.chunk_rows()
        )
        difference = own.float() - said.to(own.device)
        gap, cap = difference.abs(), trainer.args.vllm_importance_sampling_clip_max
        if not torch.isfinite(gap).all():
            return  # of the student's own; the loss is no number then, and that is dealt with there
        self._refuse(float(gap.mean()))
        self._largest = max(self._largest, float(gap.max()))
        add = trainer._metrics.add_mean
        add("sampling/logp_gap_mean", float(gap.sum()), len(gap))
        ratio = difference.exp()
        if trainer.args.vllm_importance_sampling_correction:
            batch.sampler_weight = ratio.clamp(max=cap)
            add("sampling/weight_clipped", float((ratio > cap).sum()), len(gap))

    def _refuse(self, mean: float) -> None:
        if mean <= FAR:
            return
        raise RolloutError(
            f"In step {self.trainer.state.global_step} the engine's log-probs of its own samples are {mean:.2f} nats a "
            f"token away from the student's, expected less than {FAR:.0f}: it does not have the student's weights, or "
            "reads other tokens. Look at its log for weights that were not loaded, at whether another run uses it, and "
            "at its --logprobs-mode; restart it with the student. The optimizer was not run."
        )

    def take_metrics(self) -> dict[str, float]:
        """What sums cannot hold, over all ranks since the last call. Every rank calls it at the same steps."""
        if not self.engine.own_weights:
            return {}
        mine = torch.tensor([self._largest], device=self.trainer._reduce_device)
        self._largest = 0.0
        return {"sampling/logp_gap_max": float(self.trainer.accelerator.gather(mine).max())}
