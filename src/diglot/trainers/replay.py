"""Run micro-batches again that made a loss or a gradient no number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diglot.checkpoints import batches
from diglot.comparisons import Batch
from diglot.trainers.base import DistillationTrainer

save_batches = batches.save_batches


def load_batches(folder: str | Path, trainer: DistillationTrainer) -> list[Batch]:
    """What `save_batches` wrote, read and aligned again by a trainer with the same models and options."""
    return batches.load_batches(folder, trainer.comparisons, trainer.imitations)


def replay(trainer: DistillationTrainer, folder: str | Path) -> list[dict[str, Any]]:
    """Run saved micro-batches with the trainer's weights as they are now; nothing is changed.

    Returns:
        For each: `loss` (nats per item of its window), `grad_norm`, and `nonfinite`, the parameters whose gradient is
        no finite number.
    """
    records = []
    model: Any = trainer.model
    for batch in load_batches(folder, trainer):
        model.zero_grad()
        with trainer.accelerator.autocast():
            loss = trainer.batch_loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        norm = torch.stack([g.double().norm() for g in grads.values()]).norm() if grads else torch.zeros(())
        bad = [n for n, g in grads.items() if not torch.isfinite(g).all()]
        records.append({"loss": float(loss.detach()), "grad_norm": float(norm), "nonfinite": bad})
        model.zero_grad()
    return records
