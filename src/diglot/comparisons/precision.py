"""What of the student is trained: with or without an adapter and dropout, and in which number type."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from diglot.errors import ConfigError
from diglot.heads import turn_off_dropout
from diglot.options import DistillationConfig

logger = logging.getLogger(__name__)

# Steps of AdamW are lost in the rounding of 16 bits. Optimizers of `transformers` that make up for it, and the argument
# that makes them do so.
_COMPENSATED: Mapping[str, str | None] = {
    "adamw_torch_4bit": "bf16_stochastic_round",
    "adamw_torch_8bit": "bf16_stochastic_round",
    "adamw_anyprecision": "use_kahan_summation",
    "stable_adamw": None,
}


def to_train(student: PreTrainedModel, peft_config: Any | None, args: DistillationConfig) -> Any:
    """The student, below an adapter if `peft_config` asks for one, and without dropout unless `args` keep it."""
    trained: Any = student
    if peft_config is not None:
        from peft import get_peft_model

        trained = get_peft_model(student, peft_config)
    if args.disable_dropout:
        if dropout := getattr(peft_config, "lora_dropout", 0.0):
            logger.warning(
                "The adapter's lora_dropout=%s is off like all of the student's dropout. To keep it set "
                "disable_dropout: false.",
                dropout,
            )
        turn_off_dropout(trained)
    return trained


def check_trainable(student: nn.Module, args: DistillationConfig, optimizer: torch.optim.Optimizer | None) -> None:
    """Raise `ConfigError` for prompt learning, a student without trainable weights, and trainable weights of 16 bits
    without an optimizer for them.

    Learned prompts (prompt tuning, P-tuning, prefix tuning) put positions before the text, and PEFT then leaves
    position ids out: rows would be compared with the wrong ones.

    bfloat16 has 8 bits of precision: a weight moves only if a step is a 256th of it or more, and AdamW's steps are
    about as large as the learning rate. A 16-bit base below float32 adapters is frozen, and is no matter.

    Args:
        optimizer: the caller's own, in place of `args.optim`; one of `torch.optim` keeps no float32 copy.
    """
    adapters = getattr(student, "peft_config", {}).values()
    if learned := [str(one.peft_type.value) for one in adapters if one.is_prompt_learning]:
        raise ConfigError(
            f"The student's adapter is {learned[0]}, which puts learned positions before the text, so that its rows "
            "are not those of the tokens. Use an adapter of weights, such as LoRA."
        )
    if not any(p.requires_grad for p in student.parameters()):
        raise ConfigError(
            "No weight of the student is trainable (requires_grad is False everywhere), so nothing would be learned. "
            "Unfreeze some of them, or pass peft_config."
        )
    short = {n: p.dtype for n, p in student.named_parameters() if p.requires_grad and p.dtype in _SHORT}
    if not short or args.deepspeed or _makes_up_for_rounding(args, optimizer):  # DeepSpeed keeps a float32 copy
        return
    name, dtype = next(iter(short.items()))
    raise ConfigError(
        f"{len(short)} trainable weights of the student are kept in 16 bits ({name}: {dtype}), in which most steps of "
        f"a learning rate of {args.learning_rate:g} round to nothing. Load the student in float32 (leave dtype out) "
        "and compute in 16 bits with bf16: true. To keep 16 bits, choose an optimizer that makes up for them: "
        "optim: adamw_torch_8bit with optim_args: bf16_stochastic_round=True, or stable_adamw."
    )


_SHORT = (torch.bfloat16, torch.float16)


def _makes_up_for_rounding(args: DistillationConfig, optimizer: torch.optim.Optimizer | None) -> bool:
    if optimizer is not None:
        return not type(optimizer).__module__.startswith("torch.optim")
    name = str(getattr(args.optim, "value", args.optim))
    if name not in _COMPENSATED:
        return False
    argument = _COMPENSATED[name]
    chosen = dict(one.split("=", 1) for one in (args.optim_args or "").replace(" ", "").split(",") if "=" in one)
    return argument is None or chosen.get(argument, "").lower() in ("true", "1", "yes")
