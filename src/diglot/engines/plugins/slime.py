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
from diglot.errors import ConfigError, DataError


async def reward_func(args: Any, sample: Any, **_: Any) -> dict[str, Any]:
    """What the teacher says about a sample's response: log-probs `[response_length]` in nats, and which are its own.

    Where the teacher says nothing stands the student's own log-prob, so that slime's penalty, their difference, is 0.

    Raises:
        ConfigError: no `diglot_teacher_tokenizer` in the arguments.
        DataError: a sample without the student's log-probs, or whose turns cannot be found.
    """
    tokenizer = getattr(args, "diglot_teacher_tokenizer", None)
    if not tokenizer:
        raise ConfigError("slime's arguments have no diglot_teacher_tokenizer. Name it in --custom-config-path's file.")
    length, own = sample.response_length, sample.rollout_log_probs
    own = [] if own is None else own  # as a sample without a response has it
    if len(own) != length:
        raise DataError(
            f"A sample has {len(own)} rollout_log_probs and a response of {length} tokens: the "
            "difference to the student needs one each."
        )
    scorer = connect(args.hf_checkpoint, tokenizer, args.rm_url)
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

    for sample in samples:
        logps = sample.get_reward_value(args)["teacher_log_probs"]
        sample.teacher_log_probs = torch.tensor(logps, dtype=torch.float32)
    nothing = [0.0] * len(samples)
    return nothing, nothing
