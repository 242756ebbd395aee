"""Micro-batches on disk, to be run again: what made a loss or a gradient no number. Safetensors and JSON only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from diglot.batches import AlignedBatch, PackedSide, ReadPair
from diglot.rendering import Rendered
from diglot.trainers.held import conversation_of

if TYPE_CHECKING:
    from diglot.trainers.base import DistillationTrainer

# Tensors of a batch that are not computed again.
_KEPT = ("logp_old", "logp_t", "advantage", "weight", "sampler_weight")
_SIDES = ("student", "teacher")


def save_batches(folder: Path, batches: Sequence[AlignedBatch], about: Mapping[str, Any]) -> None:
    """Write `batches.json` and `batches.safetensors` into `folder`: all that the loss depends on but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    told = [_told(batch, f"{i}.", tensors) for i, batch in enumerate(batches)]
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / "batches.safetensors")
    text = json.dumps({**about, "batches": told}, ensure_ascii=False, indent=1, default=str)
    (folder / "batches.json").write_text(text + "\n", encoding="utf-8")


def load_batches(folder: str | Path, trainer: DistillationTrainer) -> list[AlignedBatch]:
    """What `save_batches` wrote, read and aligned again by a trainer with the same models and options."""
    told = json.loads((Path(folder) / "batches.json").read_text(encoding="utf-8"))["batches"]
    tensors = load_file(Path(folder) / "batches.safetensors")
    return [_batch(one, f"{i}.", tensors, trainer) for i, one in enumerate(told)]


def replay(trainer: DistillationTrainer, folder: str | Path) -> list[dict[str, Any]]:
    """Run saved micro-batches with the trainer's weights as they are now; nothing is changed.

    Returns:
        For each: `loss` (nats per item of its window), `grad_norm`, and `nonfinite`, the parameters whose gradient is
        no finite number.
    """
    found = []
    model: Any = trainer.model
    for batch in load_batches(folder, trainer):
        model.zero_grad()
        with trainer.accelerator.autocast():
            loss = trainer.batch_loss(model, batch)
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        norm = torch.stack([g.double().norm() for g in grads.values()]).norm() if grads else torch.zeros(())
        bad = [n for n, g in grads.items() if not torch.isfinite(g).all()]
        found.append({"loss": float(loss.detach()), "grad_norm": float(norm), "nonfinite": bad})
        model.zero_grad()
    return found


def _told(batch: AlignedBatch, prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The part of a batch that is JSON; the rest goes into `tensors`."""
    for name in _KEPT:
        if (value := getattr(batch, name)) is not None:
            tensors[prefix + name] = value
    pairs = []
    for i, pair in enumerate(batch.pairs):
        tensors[f"{prefix}{i}.noncanonical"] = torch.from_numpy(pair.noncanonical)
        sides = {side: _rendered_told(getattr(pair, side), f"{prefix}{i}.{side}.", tensors) for side in _SIDES}
        pairs.append({"conversation": asdict(pair.conversation), **sides})
    reference = None
    if batch.reference is not None:
        reference = []
        for field in fields(PackedSide):
            value = getattr(batch.reference, field.name)
            tensors[f"{prefix}reference.{field.name}"] = torch.as_tensor(value)
            reference.append(field.name)
    return {
        "pairs": pairs,
        "on_policy": batch.on_policy,
        "counts": dict(batch.counts or {}),
        "places": batch.places,
        "reference": reference,
    }


def _rendered_told(side: Rendered, prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    for name in ("ids", "roles", "segment", "end", "exact"):
        tensors[prefix + name] = torch.from_numpy(np.ascontiguousarray(getattr(side, name)))
    return {"segment_bytes": [text.hex() for text in side.segment_bytes], "stopped": list(side.stopped)}


def _batch(
    told: Mapping[str, Any], prefix: str, tensors: Mapping[str, torch.Tensor], trainer: DistillationTrainer
) -> AlignedBatch:
    pairs = []
    for i, one in enumerate(told["pairs"]):
        sides = {side: _rendered(one[side], f"{prefix}{i}.{side}.", tensors) for side in _SIDES}
        noncanonical = tensors[f"{prefix}{i}.noncanonical"].numpy()
        pairs.append(ReadPair(conversation_of(one["conversation"]), sides["student"], sides["teacher"], noncanonical))
    batch = trainer.align(pairs, on_policy=bool(told["on_policy"]))
    batch.counts, batch.places = told["counts"], told["places"]
    for name in _KEPT:
        if prefix + name in tensors:
            setattr(batch, name, tensors[prefix + name].to(trainer.args.device))
    if told["reference"]:
        arrays = {n: tensors[f"{prefix}reference.{n}"] for n in told["reference"]}
        plain: dict[str, Any] = {
            n: t.numpy() if n in ("end", "segment", "exact", "role") else t for n, t in arrays.items()
        }
        batch.reference = PackedSide(**plain).to(trainer.args.device)
    return batch


def _rendered(told: Mapping[str, Any], prefix: str, tensors: Mapping[str, torch.Tensor]) -> Rendered:
    arrays = {name: tensors[prefix + name].numpy() for name in ("ids", "roles", "segment", "end", "exact")}
    texts = tuple(bytes.fromhex(text) for text in told["segment_bytes"])
    return Rendered(**arrays, segment_bytes=texts, stopped=tuple(told["stopped"]))
