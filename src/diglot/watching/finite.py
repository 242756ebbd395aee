"""No loss and no gradient that is not a finite number reaches the optimizer, on any rank.

The check is behind the backward passes of a window, where all ranks meet anyway: a rank that stopped earlier would
leave the others waiting.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diglot.checkpoints.batches import save_batches
from diglot.checkpoints.saving import any_rank
from diglot.comparisons import Batch
from diglot.errors import NonFiniteError
from diglot.options import DistillationConfig
from diglot.watching.metrics import StepMetrics

logger = logging.getLogger(__name__)

SAVED_WINDOWS = 10  # of skipped steps, their batches on disk


class FiniteSteps:
    """Stops a run (or skips the step, `on_nonfinite`) instead of stepping on what is no number."""

    def __init__(self, accelerator: Accelerator, args: DistillationConfig, metrics: StepMetrics) -> None:
        self.accelerator, self.args, self.metrics = accelerator, args, metrics
        self.rows: list[str] = []  # names of the rows behind the window, for messages
        self.skipped = 0
        self._seen: list[tuple[Batch, float]] = []  # micro-batches of the window and their losses

    def saw(self, batch: Batch, loss: Tensor) -> Tensor:
        """Note a micro-batch's loss; what is no number is logged as 0."""
        value = float(loss)
        self._seen.append((batch, value))
        return loss if math.isfinite(value) else torch.zeros_like(loss)

    def check(self, norm: Any, step: int, parameters: Iterable[Tensor], unclipped: Iterable[Tensor]) -> Any:
        """The gradient norm of a window, or 0 where its step is skipped: all gradients are cleared then.

        Args:
            parameters: all that the optimizer steps on.
            unclipped: those of which the norm knows nothing.

        Raises:
            NonFiniteError: loss or gradient is no finite number, and the run is to stop.
        """
        value = math.nan if norm is None else float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        seen, self._seen = self._seen, []
        bad = [(batch, loss) for batch, loss in seen if not math.isfinite(loss)]
        wrong = bool(bad) or not (norm is None or self._gradients_are_finite(value, unclipped))
        if not any_rank(self.accelerator, wrong):
            return norm
        self._refuse(step, bad or seen, bad[0][1] if bad else None, value)
        for parameter in parameters:  # the optimizer passes over parameters without a gradient
            parameter.grad = None
        return torch.zeros(()) if isinstance(norm, Tensor) else 0.0

    def _gradients_are_finite(self, norm: float, unclipped: Iterable[Tensor]) -> bool:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and scaler.is_enabled():
            return True  # float16: the scaler looks for overflow itself, skips the step and lowers its scale
        own = [p.grad for p in unclipped if p.grad is not None]
        return math.isfinite(norm) and all(bool(torch.isfinite(g).all()) for g in own)

    def _refuse(self, step: int, batches: list[tuple[Batch, float]], loss: float | None, norm: float) -> None:
        """Keep the batches, then stop, or say that the step is skipped."""
        what = f"The gradient norm of step {step} is {norm}" if loss is None else f"The loss of step {step} is {loss}"
        place = None
        if self.skipped < SAVED_WINDOWS:
            rank = self.args.process_index
            place = Path(str(self.args.output_dir)) / "nonfinite" / f"step-{step}-rank-{rank}"
            about = {"step": step, "rows": self.rows, "losses": [one for _, one in batches], "norm": norm}
            save_batches(place, [batch for batch, _ in batches], {**about, "seed": self.args.seed})
        rows = ", ".join(self.rows)
        text = f"{what}, expected a finite number (rows: {rows}). The batch is in {place}: see diglot.trainers.replay."
        if self.args.on_nonfinite == "stop":
            raise NonFiniteError(
                f"{text} The optimizer was not run. Lower the learning rate, look at the batch, or go on over such "
                "steps with on_nonfinite='skip'."
            )
        self.skipped += 1
        self.metrics.add_count("nonfinite_steps", 1.0 / self.accelerator.num_processes)
        logger.warning("%s The step is skipped.", text)
