"""prime-rl: `compute_teacher_logprobs` of its orchestrator, for a teacher with another tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from diglot.engines.scores import as_array
from diglot.engines.serving.scorer import Scorer


async def compute_teacher_logprobs(scorer: Scorer, samples: Sequence[Any]) -> list[list[float]]:
    """The teacher's log-prob of each of a sample's ids, in nats, one list for each sample.

    Args:
        scorer: of `diglot.engines.plugins.connect.connect`.
        samples: with `token_ids`, `mask` and `logprobs`, or, as older versions have them, `prompt_ids`,
            `completion_ids` and `completion_logprobs`.

    Where the teacher says nothing stands the sampler's own log-prob: no difference, so no reward. In prompts that is 0.
    """
    return list(await asyncio.gather(*(_one(scorer, sample) for sample in samples)))


async def _one(scorer: Scorer, sample: Any) -> list[float]:
    if hasattr(sample, "token_ids"):
        ids, own = sample.token_ids, sample.logprobs
    else:
        ids = [*sample.prompt_ids, *sample.completion_ids]
        written = sample.completion_logprobs
        own = [*([0.0] * len(sample.prompt_ids)), *([] if written is None else written)]
    own = as_array(own, np.float64)
    result = await scorer.score(np.asarray(ids), student_logps=own)
    return [float(logp) for logp in result.filled(own)]
