"""Micro-batches on disk, to be run again: what made a loss or a gradient no number. Safetensors and JSON only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diglot.batches import ReadPair
from diglot.checkpoints.held import conversation_of
from diglot.comparisons import Batch, Comparison, Read, View, make_batch
from diglot.objectives import Rollout
from diglot.rendering import Rendered

Tensors = dict[str, Tensor]
_ARRAYS = ("ids", "roles", "segment", "end", "exact")
_ROLLOUT = ("logp_old", "logp_t", "weight", "advantage")


def save_batches(folder: Path, batches: Sequence[Batch], about: Mapping[str, Any]) -> None:
    """Write `batches.json` and `batches.safetensors` into `folder`: all that the loss depends on but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: Tensors = {}
    plain = [_plain(batch, f"{i}.", tensors) for i, batch in enumerate(batches)]
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / "batches.safetensors")
    text = json.dumps({**about, "batches": plain}, ensure_ascii=False, indent=1, default=str)
    (folder / "batches.json").write_text(text + "\n", encoding="utf-8")


def load_batches(
    folder: str | Path, comparisons: Sequence[Comparison], reference: Sequence[Comparison] = ()
) -> list[Batch]:
    """What `save_batches` wrote, aligned again. `reference` is what texts to imitate are compared with."""
    entries = json.loads((Path(folder) / "batches.json").read_text(encoding="utf-8"))["batches"]
    tensors = load_file(Path(folder) / "batches.safetensors")
    return [_batch(one, f"{i}.", tensors, comparisons, reference) for i, one in enumerate(entries)]


def _plain(batch: Batch, prefix: str, tensors: Tensors) -> dict[str, Any]:
    """The part of a batch that is JSON; the rest goes into `tensors`."""
    if batch.sampler_weight is not None:
        tensors[f"{prefix}sampler_weight"] = batch.sampler_weight
    views = [_plain_view(view, f"{prefix}view{k}.", tensors) for k, view in enumerate(batch.views)]
    reference = None if batch.reference is None else _plain(batch.reference, f"{prefix}reference.", tensors)
    return {"on_policy": batch.on_policy, "places": batch.places, "views": views, "reference": reference}


def _plain_view(view: View, prefix: str, tensors: Tensors) -> dict[str, Any]:
    for name in _ROLLOUT if view.rollout is not None else ():
        if (value := getattr(view.rollout, name)) is not None:
            tensors[prefix + name] = value
    pairs = [_plain_pair(pair, f"{prefix}{i}.", tensors) for i, pair in enumerate(view.read.pairs)]
    return {"pairs": pairs, "texts": view.texts, "weight": view.weight, "counts": dict(view.counts)}


def _plain_pair(pair: ReadPair, prefix: str, tensors: Tensors) -> dict[str, Any]:
    tensors[f"{prefix}noncanonical"] = torch.from_numpy(pair.noncanonical)
    sides = {}
    for side, rendered in (("student", pair.student), ("teacher", pair.teacher)):
        for name in _ARRAYS:
            tensors[f"{prefix}{side}.{name}"] = torch.from_numpy(np.array(getattr(rendered, name)))
        texts = [text.hex() for text in rendered.segment_bytes]
        sides[side] = {"segment_bytes": texts, "stopped": list(rendered.stopped)}
    return {"conversation": asdict(pair.conversation), **sides}


def _batch(
    plain: Mapping[str, Any],
    prefix: str,
    tensors: Mapping[str, Tensor],
    comparisons: Sequence[Comparison],
    reference: Sequence[Comparison],
) -> Batch:
    count = len(plain["places"])
    reads: list[list[ReadPair | None]] = [[None] * len(comparisons) for _ in range(count)]
    for k, view in enumerate(plain["views"]):
        texts = range(count) if view["texts"] is None else view["texts"]
        for i, (text, pair) in enumerate(zip(texts, view["pairs"], strict=True)):
            reads[text][k] = _pair(pair, f"{prefix}view{k}.{i}.", tensors)
    rows: list[Read] = [tuple(read) for read in reads]
    batch = make_batch(comparisons, rows, plain["places"], on_policy=bool(plain["on_policy"]))
    device = batch.student.rows.device
    moved = {name: value.to(device) for name, value in tensors.items() if name.startswith(prefix)}
    batch.sampler_weight = moved.get(f"{prefix}sampler_weight")
    for k, saved in enumerate(plain["views"]):
        facts = {n: moved[f"{prefix}view{k}.{n}"] for n in _ROLLOUT if f"{prefix}view{k}.{n}" in moved}
        rollout = Rollout(**facts) if facts else None
        batch.views[k] = replace(batch.views[k], rollout=rollout, weight=saved["weight"], counts=saved["counts"])
    if plain["reference"] is not None:
        batch.reference = _batch(plain["reference"], f"{prefix}reference.", tensors, reference, ())
    return batch


def _pair(plain: Mapping[str, Any], prefix: str, tensors: Mapping[str, Tensor]) -> ReadPair:
    sides = []
    for side in ("student", "teacher"):
        arrays: dict[str, Any] = {name: tensors[f"{prefix}{side}.{name}"].numpy() for name in _ARRAYS}
        texts = tuple(bytes.fromhex(text) for text in plain[side]["segment_bytes"])
        sides.append(Rendered(**arrays, segment_bytes=texts, stopped=tuple(plain[side]["stopped"])))
    student, teacher = sides
    return ReadPair(conversation_of(plain["conversation"]), student, teacher, tensors[f"{prefix}noncanonical"].numpy())
