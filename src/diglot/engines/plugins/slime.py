"""slime and miles: `--custom-rm-path` and `--custom-reward-post-process-path` for a teacher with another tokenizer.

    --use-opd --opd-type sglang --rm-url http://TEACHER:30000/generate
    --custom-rm-path diglot.engines.plugins.slime.reward_func
    --custom-reward-post-process-path diglot.engines.plugins.slime.post_process_rewards
    --custom-config-path diglot.yaml        # holds: diglot_teacher_tokenizer: google/gemma-3-27b-it

The student's tokenizer is that of `--hf-checkpoint`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from diglot.engines.plugins.connect import connect
from diglot.engines.scores import as_array
from diglot.errors import ConfigError, DataError


async def reward_func(args: Any, sample: Any, **_: Any) -> dict[str, Any]:
    """What the teacher says about a sample's response: log-probs `[response_length]` in nats, and which are its own.

    Where the teacher says nothing stands the student's own log-prob, so that slime's penalty, their difference, is 0.

    Raises:
        ConfigError: no `diglot_teacher_tokenizer` or `rm_url` in the arguments.
        DataError: a sample without the student's log-probs, or whose turns cannot be found.
    """
    for name, where in (("diglot_teacher_tokenizer", "in --custom-config-path's file"), ("rm_url", "as --rm-url")):
        if not getattr(args, name, None):
            raise ConfigError(f"slime's arguments have no {name}. Give it {where}.")
    length, own = sample.response_length, sample.rollout_log_probs
    own = as_array([] if own is None else own, np.float64)  # none, as a sample without a response has it
    if own.shape != (length,) or length > len(sample.tokens):
        raise DataError(
            f"A sample has rollout_log_probs of shape {own.shape}, {len(sample.tokens)} tokens and a response of "
            f"{length} of them: the difference to the student needs one log-prob for each token of the response."
        )
    scorer = connect(args.hf_checkpoint, args.diglot_teacher_tokenizer, args.rm_url)
    student = np.zeros(len(sample.tokens))
    if length:
        student[-length:] = own
    result = await scorer.score(np.asarray(sample.tokens), student_logps=student)
    first = len(sample.tokens) - length
    return {
        "teacher_log_probs": result.filled(student)[first:].tolist(),
        "valid": result.valid[first:].tolist(),
        "coverage": result.coverage,
    }


def post_process_rewards(args: Any, samples: list[Any], **_: Any) -> tuple[list[float], list[float]]:
    """Put the teacher's log-probs on the samples; the task's reward is 0, as in pure distillation."""
    import torch

    for number, sample in enumerate(samples):
        if not isinstance(sample.reward, dict) or "teacher_log_probs" not in sample.reward:
            raise DataError(
                f"Sample {number} has the reward {sample.reward!r:.80}, expected that of reward_func. Name it in "
                "--custom-rm-path."
            )
        sample.teacher_log_probs = torch.tensor(sample.reward["teacher_log_probs"], dtype=torch.float32)
    nothing = [0.0] * len(samples)
    return nothing, nothing
