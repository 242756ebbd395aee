"""What the Trainer offers and a distillation cannot do: refused by name, where it would be ignored or fail later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from transformers import Trainer

from diglot.errors import ConfigError


def check_arguments(args: object, expected: type, compute_metrics: Callable[..., Any] | None) -> None:
    """Raise `ConfigError` for the options of another trainer, and for arguments that nothing would ever use."""
    if not isinstance(args, expected):
        raise ConfigError(
            f"args is a {type(args).__name__}, and this trainer's options are a {expected.__name__}. Pass one: it "
            "takes all options of TrainingArguments."
        )
    if compute_metrics is not None:
        raise ConfigError(
            "compute_metrics is never called: an evaluation has no predictions and labels, it measures bits per byte "
            "and a divergence. Drop it, and measure beside the run with a callback's on_evaluate."
        )


class RefusingTrainer(Trainer):
    """A Trainer without what needs a batch that one model reads by itself, whose accelerator divides no loss and which
    misses no weight that a checkpoint holds under another name."""

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's. It accumulates by itself; in 5.4 Accelerate divides by the steps as well."""
        super().create_accelerator_and_postprocess()
        self.accelerator.gradient_accumulation_steps = 1

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """The Trainer's own, but of tied weights: a file holds them once, and all their names have got them."""
        assert self.model is not None
        held, missing = self.model.state_dict(keep_vars=True), load_result.missing_keys
        loaded = {id(weight) for name, weight in held.items() if name not in missing}
        truly = [name for name in missing if name not in held or id(held[name]) not in loaded]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=truly))

    def predict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise `ConfigError`."""
        raise ConfigError(
            "predict needs batches of input_ids for one model. Use evaluate() for numbers, and the student's own "
            "generate() for texts."
        )
