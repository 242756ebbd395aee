"""No loss and no gradient that is not a finite number reaches the optimizer, on any rank.

The check is behind the backward passes of a window, where all ranks meet anyway: a rank that stopped earlier would
leave the others waiting.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diglot.batches import AlignedBatch
from diglot.errors import NonFiniteError
from diglot.trainers.config import DistillationConfig
from diglot.trainers.metrics import StepMetrics
from diglot.trainers.replay import save_batches
from diglot.trainers.saving import WholeCheckpoints, any_rank

logger = logging.getLogger(__name__)

KEPT_WINDOWS = 10  # of skipped steps, their batches on disk


class FiniteSteps(WholeCheckpoints):
    """A trainer that stops (or skips the step, `on_nonfinite`) instead of stepping on what is no number."""

    args: DistillationConfig
    _metrics: StepMetrics
    projectors: dict[str, torch.nn.Parameter]
    rows_of_window: list[str]  # names of the rows behind the window, for messages
    skipped_steps = 0
    _seen: Sequence[tuple[AlignedBatch, float]] = ()  # micro-batches of the window and their losses

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As `Trainer.training_step`; keeps what `_get_grad_norm` will look at."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        value = float(loss)
        self._seen = [*self._seen, (inputs["batch"], value)]
        return loss if math.isfinite(value) else torch.zeros_like(loss)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """The norm before the optimizer's step: the place to refuse it."""
        norm = super()._get_grad_norm(model, grad_norm)
        value = math.nan if norm is None else float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        seen, self._seen = list(self._seen), ()
        bad = [(batch, loss) for batch, loss in seen if not math.isfinite(loss)]
        wrong = bool(bad) or not (norm is None or self._gradients_are_finite(value))
        if not any_rank(self, wrong):
            return norm
        self._refuse(model, bad or seen, bad[0][1] if bad else None, value)
        return torch.zeros(()) if isinstance(norm, Tensor) else 0.0

    def _gradients_are_finite(self, norm: float) -> bool:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and scaler.is_enabled():
            return True  # float16: the scaler looks for overflow itself, skips the step and lowers its scale
        own = [p.grad for p in self.projectors.values() if p.grad is not None]
        return math.isfinite(norm) and all(bool(torch.isfinite(g).all()) for g in own)

    def _refuse(
        self, model: torch.nn.Module, batches: list[tuple[AlignedBatch, float]], loss: float | None, norm: float
    ) -> None:
        """Keep the batches, then stop, or clear all gradients: the optimizer passes over parameters without one."""
        step, rank = self.state.global_step, self.args.process_index
        what = f"The gradient norm of step {step} is {norm}" if loss is None else f"The loss of step {step} is {loss}"
        place = None
        if self.skipped_steps < KEPT_WINDOWS:
            place = Path(str(self.args.output_dir)) / "nonfinite" / f"step-{step}-rank-{rank}"
            about = {"step": step, "rows": self.rows_of_window, "losses": [one for _, one in batches], "norm": norm}
            save_batches(place, [batch for batch, _ in batches], {**about, "seed": self.args.seed})
        rows = ", ".join(self.rows_of_window)
        told = f"{what}, expected a finite number (rows: {rows}). The batch is in {place}: see diglot.trainers.replay."
        if self.args.on_nonfinite == "stop":
            raise NonFiniteError(
                f"{told} The optimizer was not run. Lower the learning rate, look at the batch, or go on over such "
                "steps with on_nonfinite='skip'."
            )
        self.skipped_steps += 1
        self._metrics.add_count("nonfinite_steps", 1.0 / self.accelerator.num_processes)
        logger.warning("%s The step is skipped.", told)
        for parameter in (*model.parameters(), *self.projectors.values()):
            parameter.grad = None
