"""Sampling with `transformers`: prompts of ids in, completions of ids out, nothing decoded in between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from diglot.arrays import Ids
from diglot.batches import padded
from diglot.batches.sending import sent
from diglot.heads import evaluating
from diglot.rollouts.draws import Nucleus, RowDraws, seeds_of_rows
from diglot.rollouts.engine import Completion


def pad_left(prompts: Sequence[Ids], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as `input_ids` and `attention_mask`, both int64 [B, T], padded on the left."""
    ids, mask = padded(prompts, pad_id, left=True)
    return sent(torch.from_numpy(ids), device), sent(torch.from_numpy(mask), device)


@contextmanager
def sampling_mode(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, no gradient and a neutral generation config; all are put back afterwards.

    A model's own generation config may hold a repetition penalty or a nucleus: samples would not follow the model's
    distribution, and `generate` would fill them in wherever the caller left a default.
    """
    own_config, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with evaluating(model), torch.no_grad():
            yield
    finally:
        model.generation_config = own_config


@dataclass(frozen=True)
class TransformersSampler:
    """Samples completions from a model at hand.

    Args:
        stop_ids: ids that end a completion; the one that was sampled is kept as its last id.
        pad_id: fills shorter prompts, never read by the model.
        temperature: 1 is the model's own distribution, as are 1 and 0 of the next two.
        top_p: nucleus sampling.
        top_k: 0 is off.
    """

    stop_ids: tuple[int, ...]
    pad_id: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __call__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Ids],
        *,
        max_new_tokens: int,
        seed: int | Sequence[int],
        processors: Sequence[LogitsProcessor] = (),
    ) -> list[Ids]:
        """One completion for each prompt, in order. A completion without a stop id at its end was cut.

        `seed`: one for each prompt, or one from which they follow. What is drawn for a prompt depends on its own seed
        and scores, whatever else is in the batch. `processors` bend the scores before temperature and nucleus.
        """
        if not prompts:
            return []
        config = GenerationConfig(
            do_sample=False,  # `RowDraws` draws
            max_new_tokens=max_new_tokens,
            eos_token_id=list(self.stop_ids),
            pad_token_id=self.pad_id,
        )
        ids, mask = pad_left(prompts, self.pad_id, model.device)
        draws = RowDraws(seeds_of_rows(seed, len(prompts)), ids.shape[1], max_new_tokens)
        with sampling_mode(model):
            out = model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                synced_gpus=False,  # a sharded model is `gathered` here, and ranks write texts of different number
                logits_processor=LogitsProcessorList([*processors, *self._warpers(), draws]),
            )
        return [self._until_stop(row) for row in out[:, ids.shape[1] :].cpu().numpy()]

    def _warpers(self) -> list[LogitsProcessor]:
        """Temperature, top-k and nucleus, in this order, where they are on."""
        warpers: list[LogitsProcessor] = []
        if self.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            warpers.append(Nucleus(self.top_p))
        return warpers

    own_weights: ClassVar[bool] = False
    elsewhere: ClassVar[bool] = False

    def sync(self, model: PreTrainedModel) -> None:
        """Nothing to do: it runs the model itself."""

    def write(
        self, model: PreTrainedModel, prompts: Sequence[Ids], *, max_new_tokens: int, seed: int | Sequence[int]
    ) -> list[Completion]:
        """As `RolloutEngine.write`."""
        return [Completion(ids) for ids in self(model, prompts, max_new_tokens=max_new_tokens, seed=seed)]

    def break_off(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing to let go of."""

    def _until_stop(self, completion: Ids) -> Ids:
        """`generate` fills finished rows with padding, which may itself be a stop id: cut after the first stop."""
        stops = np.flatnonzero(np.isin(completion, self.stop_ids))
        return completion[: stops[0] + 1] if len(stops) else completion
