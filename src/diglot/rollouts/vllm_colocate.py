"""Completions by vLLM inside the training process (`vllm_mode: colocate`)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel

from diglot.arrays import Ids
from diglot.errors import ConfigError, RolloutError
from diglot.rollouts.draws import seeds_of_rows
from diglot.rollouts.engine import Completion
from diglot.rollouts.vllm_wire import Sampling, checked
from diglot.rollouts.weights import WeightsFolder


class ColocatedVLLM:
    """vLLM's `LLM` beside the student. It is made from the student's weights by the first `sync`, later ones reload it.

    Args:
        sampling: the trainer's own temperature, nucleus and stop set.
        weights: where the checkpoints between the two are written.
        options: for `vllm.LLM`, for instance `max_model_len` and `gpu_memory_utilization`.
        dtype: of vLLM's weights; by default the student's.
    """

    own_weights = True
    elsewhere = False

    def __init__(
        self, sampling: Sampling, weights: WeightsFolder, options: dict[str, Any], dtype: str | None = None
    ) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                "vllm_mode='colocate' needs the package vllm in this environment, and it is not there. Install it "
                "(`pip install vllm`; it pins its own torch), or run `vllm serve` elsewhere and choose "
                "vllm_mode='server'."
            )
        self.sampling, self.weights, self.options, self.dtype = sampling, weights, options, dtype
        self._llm: Any = None
        self._whole_head = False

    def sync(self, model: PreTrainedModel) -> None:
        """Make the engine from the weights of `model`, or load them into it in place."""
        if self._llm is None:
            self._start(model)
            return
        with self.weights.holding(model, whole_head=self._whole_head) as folder:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        if not self._llm.reset_prefix_cache():
            raise RolloutError(
                "vLLM keeps keys and values of the old weights: reset_prefix_cache said no, expected yes. Is something "
                "else using the engine?"
            )

    def _start(self, model: PreTrainedModel) -> None:
        # One process: a second one would need the main module to be importable, and this one's settings.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        make: Callable[..., Any]
        from vllm import LLM as make  # type: ignore[import-not-found, no-redef, unused-ignore]
        from vllm.platforms import current_platform  # type: ignore[import-not-found, unused-ignore]

        # On a CPU vLLM computes logits with a packed copy of a tied head, which a reload leaves as it was.
        self._whole_head = bool(getattr(model.config, "tie_word_embeddings", False) and current_platform.is_cpu())
        fixed = dict(skip_tokenizer_init=True, generation_config="vllm", dtype=self.dtype or _name(model.dtype))
        with self.weights.holding(model, whole_head=self._whole_head) as folder:
            self._llm = make(model=str(folder), **fixed, **self.options)

    def write(
        self, model: PreTrainedModel, prompts: Sequence[Ids], *, max_new_tokens: int, seed: int | Sequence[int]
    ) -> list[Completion]:
        """As `RolloutEngine.write`. `model` is not used: vLLM has the weights of the last `sync`."""
        if not prompts:
            return []
        from vllm import SamplingParams  # type: ignore[import-not-found, unused-ignore]

        seeds = seeds_of_rows(seed, len(prompts))
        parameters = [SamplingParams(**self.sampling.parameters(max_new_tokens, s), detokenize=False) for s in seeds]
        inputs = [{"prompt_token_ids": [int(i) for i in prompt]} for prompt in prompts]
        answers = self._llm.generate(inputs, parameters, use_tqdm=False)
        return [self._read(one.outputs[0], max_new_tokens) for one in answers]

    def _read(self, output: Any, max_new_tokens: int) -> Completion:
        ids = [int(i) for i in output.token_ids]
        rows = output.logprobs
        logps = None if rows is None else [row[i].logprob for i, row in zip(ids, rows, strict=False)]
        return checked(ids, logps, output.finish_reason, self.sampling, max_new_tokens)

    def break_off(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Let go of vLLM's memory."""
        self._llm = None
        self.weights.clear()


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
