"""What vLLM is asked for a completion, and how its answer is read. Ids go in and ids come out, never text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diglot.arrays import Ids
from diglot.errors import RolloutError
from diglot.rollouts.engine import Completion

_ROUNDING = 1e-2  # a log-probability above 0 by less is rounding


@dataclass(frozen=True)
class Sampling:
    """How is drawn. 1, 1 and 0 sample from the model's own distribution."""

    stop_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def parameters(self, max_new_tokens: int, seed: int) -> dict[str, Any]:
        """vLLM's sampling parameters.

        All that a model's `generation_config.json` could bend are given, since the server fills in from there what a
        request leaves out; with `ignore_eos` the stop set is ours and no other.
        """
        return {
            "max_tokens": max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": seed,
            "logprobs": 0,
            "stop_token_ids": [int(i) for i in self.stop_ids],
            "ignore_eos": True,
        }


def request(model: str, prompt: Ids, sampling: Sampling, max_new_tokens: int, seed: int) -> dict[str, Any]:
    """The body of a request to `/v1/completions` for one completion of one prompt."""
    parameters = sampling.parameters(max_new_tokens, seed)
    return {"model": model, "prompt": [int(i) for i in prompt], "return_token_ids": True, **parameters}


def read(answer: Any, prompt: Ids, sampling: Sampling, max_new_tokens: int) -> Completion:
    """The completion in an answer of the server's. `RolloutError` for one that is not what was asked for."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        count = len(choices) if isinstance(choices, list) else "no"
        raise RolloutError(f"The server's answer has {count} choices, expected 1: it does not speak vLLM's form.")
    choice = choices[0]
    ids, logprobs = choice.get("token_ids"), choice.get("logprobs")
    if not isinstance(ids, list):
        raise RolloutError(
            "The server answered 200 and left out token_ids, which the request asked for (return_token_ids). Text is "
            "not read back into ids, which may differ from those that were sampled: use a newer vLLM."
        )
    echoed = choice.get("prompt_token_ids")
    if echoed is not None and list(echoed) != [int(i) for i in prompt]:
        raise RolloutError(
            f"The server read {len(echoed)} prompt ids, and the {len(prompt)} that were sent are others. It must take "
            "ids as they are."
        )
    values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    return checked(ids, values, choice.get("finish_reason"), sampling, max_new_tokens)


def checked(
    ids: Sequence[int], logps: Sequence[float] | None, reason: str | None, sampling: Sampling, max_new_tokens: int
) -> Completion:
    """A completion whose end and log-probs are what they must be.

    Raises:
        RolloutError: no log-prob for each id, or an end that the stop set and the limit do not explain.
    """
    if logps is None or len(logps) != len(ids):
        raise RolloutError(
            f"{len(ids)} ids came with {'no' if logps is None else len(logps)} log-probs, expected one each: without "
            "them nobody can see whether the engine has the student's weights."
        )
    values = np.array([math.nan if x is None else x for x in logps], dtype=np.float64)
    if not np.isfinite(values).all() or (values > _ROUNDING).any():
        worst = values[~np.isfinite(values) | (values > _ROUNDING)][0]
        raise RolloutError(
            f"A sampled id has log-prob {worst}, expected a finite number of at most 0. Start vLLM without "
            "--logprobs-mode (raw_logprobs)."
        )
    stops = [k for k, i in enumerate(ids) if i in sampling.stop_ids]
    as_expected = stops == [len(ids) - 1] if reason == "stop" else not stops and len(ids) == max_new_tokens
    if reason not in ("stop", "length") or not as_expected:
        raise RolloutError(
            f"A completion of {len(ids)} ids ends with {ids[-1] if ids else None} for the reason {reason!r}; expected "
            f"a stop id of {list(sampling.stop_ids)}, once and at the end, or {max_new_tokens} ids without one. The "
            "engine stops by rules of its own, or was interrupted."
        )
    return Completion(np.array(ids, dtype=np.int64), values)
