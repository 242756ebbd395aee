"""Between which numbers an option lies; those of the Trainer too, which takes them as they come."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Collection, Mapping
from enum import Enum
from typing import Any

from diglot.errors import ConfigError

Range = tuple[float | None, float | None, str]

_COUNT: Range = (1, None, "1 or more")
_NATURAL: Range = (0, None, "0 or more")
_POSITIVE: Range = (math.ulp(0.0), None, "greater than 0")
_SHARE: Range = (0, 1, "in [0, 1]")
_POSITIVE_SHARE: Range = (math.ulp(0.0), 1, "in (0, 1]")
_BELOW_ONE: Range = (0, math.nextafter(1.0, 0.0), "in [0, 1)")

RANGES: Mapping[str, Range] = {
    **dict.fromkeys(
        (
            "max_length", "teacher_max_length", "rows_per_chunk", "log_completions_steps", "max_new_tokens", "lora_r",
            "lora_alpha", "dataloader_prefetch_factor", "ddp_bucket_cap_mb", "ddp_timeout", "eval_accumulation_steps",
            "gradient_accumulation_steps", "per_device_eval_batch_size", "per_device_train_batch_size",
            "save_total_limit", "torch_empty_cache_steps", "max_completion_length", "num_generations", "num_iterations",
            "teacher_server_concurrency",
        ),
        _COUNT,
    ),
    **dict.fromkeys(
        (
            "num_completions_to_print", "data_seed", "dataloader_num_workers", "eval_delay",
            "learning_rate", "lm_coef", "max_grad_norm", "neftune_noise_alpha", "warmup_steps", "weight_decay",
        ),
        _NATURAL,
    ),
    **dict.fromkeys(
        (
            "adam_epsilon", "epsilon", "eval_steps", "kd_temperature", "logging_steps", "num_train_epochs",
            "reward_clip", "save_steps", "teacher_server_retry_seconds", "teacher_server_timeout", "temperature",
            "vllm_importance_sampling_clip_max", "vllm_server_timeout", "dataset_test_size",
        ),
        _POSITIVE,
    ),
    **dict.fromkeys(("beta", "gamma", "lmbda", "min_coverage"), _SHARE),
    **dict.fromkeys(("top_p", "vllm_gpu_memory_utilization"), _POSITIVE_SHARE),
    **dict.fromkeys(
        ("lora_dropout", "adam_beta1", "adam_beta2", "teacher_mixed_alpha"), _BELOW_ONE
    ),
    "label_smoothing_factor": (0, 0, "0: distributions are compared, and there are no labels to smooth"),
    "log_rollouts": (0, None, "0 (none) or more"),
    "strict_top_k": (0, None, "0 (all shared tokens) or more"),
    "top_k": (0, None, "0 (off) or more"),
    "rollout_ahead": (0, 1, "0 or 1"),
    "max_steps": (-1, None, "-1 (as many as num_train_epochs says) or more"),
    "vllm_server_port": (1, 65535, "a port, 1 to 65535"),
    "seed": (0, 2**32 - 1, "in [0, 2^32)"),
}  # fmt: skip
_OF_THE_LOOP = {
    **dict.fromkeys(("label_names", "include_for_metrics", "eval_accumulation_steps")),
    **dict.fromkeys(("prediction_loss_only", "batch_eval_metrics", "eval_use_gather_object"), False),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), False),
    "eval_do_concat_batches": True,
}


def check_ranges(values: Mapping[str, object]) -> None:
    """Raise `ConfigError` for the first number that is not finite or not in its range; None is what an option has when
    it is off."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name}={value!r} is not allowed: it must be a finite number.")
        low, high, rule = range_ = RANGES.get(name, (None, None, ""))
        if value is None or not rule:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and range_ is _COUNT and not isinstance(value, int):
            raise ConfigError(f"{name}={value!r} is not allowed: it must be a whole number, {rule}.")
        if not number or (low is not None and value < low) or (high is not None and value > high):  # type: ignore[operator]
            raise ConfigError(f"{name}={value!r} is not allowed: it must be {rule}.")


def check_texts(values: Mapping[str, object]) -> None:
    """Raise `ConfigError` for texts that the Trainer would stumble over only when it uses them."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
    from transformers.training_args import OptimizerNames

    choices: dict[str, type[Enum]] = {
        **dict.fromkeys(("eval_strategy", "logging_strategy"), IntervalStrategy),
        "save_strategy": SaveStrategy, "hub_strategy": HubStrategy, "lr_scheduler_type": SchedulerType,
        "optim": OptimizerNames,
    }  # fmt: skip
    for name, kind in choices.items():
        if (value := values.get(name)) is not None:
            one_of(name, getattr(value, "value", value), [one.value for one in kind])
    reports = values.get("report_to") or []
    known = {"all", "none", *INTEGRATION_TO_CALLBACK}
    for one in [reports] if isinstance(reports, str) else reports:  # type: ignore[attr-defined]
        one_of("report_to", one, sorted(known))
    seen = str(values.get("include_num_input_tokens_seen")).lower()
    if seen not in ("no", "false"):
        raise ConfigError(
            f"include_num_input_tokens_seen={seen!r} is not allowed: the Trainer would count 0, since a batch is read "
            "on two sides. num_tokens in the log counts the student's tokens. Leave it at 'no'."
        )
    order = values.get("train_sampling_strategy")
    if order in ("group_by_length", "batch_rebalance"):
        raise ConfigError(
            f"train_sampling_strategy={order!r} is not allowed: lengths are known when a text is written and read. "
            "Samples of similar length share a micro-batch anyway. Take 'random' or 'sequential'."
        )
    if values.get("remove_unused_columns"):
        raise ConfigError(
            "remove_unused_columns=True is not allowed: the columns of the data are no inputs of a model, and all "
            "would be removed. Leave it at False."
        )
    for name, default in _OF_THE_LOOP.items():
        if bool(value := values.get(name, default)) != bool(default):
            raise ConfigError(
                f"{name}={value!r} is not allowed: it is of the Trainer's loop over predictions and labels, and an "
                f"evaluation has none: it measures bits per byte and a divergence. Leave it at {default}."
            )
    optim_args = values.get("optim_args")
    if optim_args and not all("=" in part for part in str(optim_args).split(",")):
        raise ConfigError(f"optim_args={optim_args!r} is not allowed: it must be name=value, with commas between.")
    if isinstance(values.get("parallelism_config"), str):
        raise ConfigError(
            f"parallelism_config={values['parallelism_config']!r} is not allowed: it must be an object of "
            "Accelerate's, which only a Python script can give."
        )


def one_of(name: str, value: object, known: Collection[str]) -> None:
    """`ConfigError` for a value that is not among the `known` ones, with the nearest of them."""
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ConfigError(f"{name}={value!r} is not allowed: it must be one of {', '.join(known)}{hint}")


def as_mapping(name: str, value: object) -> dict[str, Any] | None:
    """A mapping, also where it comes as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{name}={value!r} is not valid JSON: {error}. Write a mapping, for instance {{}}."
            ) from error
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{name}={value!r} is not allowed: it must be a mapping.")
    return value
