"""What the Trainer offers and a distillation cannot do: refused by name, where it would be ignored or fail later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import transformers
from transformers import Trainer

from diglot.errors import ConfigError


def check_arguments(compute_metrics: Callable[..., Any] | None, accumulation_steps: int) -> None:
    """Raise `ConfigError` for arguments that nothing would ever use, or that this version of transformers spoils."""
    if accumulation_steps > 1 and not hasattr(Trainer, "loss_is_scaled_for_ga"):
        raise ConfigError(
            f"transformers {transformers.__version__} divides every micro-batch's loss by gradient_accumulation_steps="
            f"{accumulation_steps}, though it is a share of the window's already: gradients are too small. Install "
            "a version whose Trainer has loss_is_scaled_for_ga (5.23 does), or set gradient_accumulation_steps to 1."
        )
    if compute_metrics is not None:
        raise ConfigError(
            "compute_metrics is never called: an evaluation has no predictions and labels, it measures bits per byte "
            "and a divergence. Drop it, and measure beside the run with a callback's on_evaluate."
        )


class RefusingTrainer(Trainer):
    """A Trainer without what needs a batch that one model reads by itself."""

    def predict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise `ConfigError`."""
        raise ConfigError(
            "predict needs batches of input_ids for one model. Use evaluate() for numbers, and the student's own "
            "generate() for texts."
        )
