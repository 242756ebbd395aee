"""Completions that serve several optimizer steps, written beside a checkpoint and read back on resume.

Safetensors and JSON only. What can be computed again from ids, models and options is not stored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from diglot.arrays import Ids
from diglot.rendering import Conversation

_OPTIONAL = ("sampler_weight", "explained")


@dataclass(frozen=True)
class HeldBatch:
    """One micro-batch: its conversations, the completions in student ids, and their log-probs when they were
    written."""

    conversations: list[Conversation]
    completions: list[Ids]
    logp_old: Tensor  # float32 [N_s]
    places: list[int] | None = None  # of each completion in the window, in the order of the data
    sampler_weight: Tensor | None = None  # float32 [N_s], of an engine with weights of its own
    explained: Tensor | None = None  # [N_s] nats, what single steps said of the tokens when they were written


def save_held(folder: Path, rank: int | str, batches: Sequence[HeldBatch]) -> None:
    """Write `rollouts-<rank>.json` and `rollouts-<rank>.safetensors` into `folder`."""
    text = [
        [
            {**asdict(c), "completion": ids.tolist(), "place": place}
            for c, ids, place in zip(b.conversations, b.completions, b.places or range(len(b.completions)), strict=True)
        ]
        for b in batches
    ]
    (folder / f"rollouts-{rank}.json").write_text(json.dumps(text, ensure_ascii=False), encoding="utf-8")
    tensors = {str(i): b.logp_old.detach().cpu().contiguous() for i, b in enumerate(batches)}
    for i, b in enumerate(batches):
        for name in _OPTIONAL:
            if (value := getattr(b, name)) is not None:
                tensors[f"{i}.{name}"] = value.detach().cpu().contiguous()
    save_file(tensors, folder / f"rollouts-{rank}.safetensors")


def load_held(folder: Path, rank: int | str) -> list[HeldBatch] | None:
    """What `save_held` wrote, or None if the checkpoint holds no rollouts."""
    path = folder / f"rollouts-{rank}.json"
    if not path.exists():
        return None
    tensors = load_file(folder / f"rollouts-{rank}.safetensors")
    batches = []
    for i, rows in enumerate(json.loads(path.read_text(encoding="utf-8"))):
        completions = [np.array(row.pop("completion"), dtype=np.int64) for row in rows]
        places = [row.pop("place") for row in rows] if all("place" in row for row in rows) else None
        optional = {name: tensors.get(f"{i}.{name}") for name in _OPTIONAL}
        conversations = [conversation_of(row) for row in rows]
        batches.append(HeldBatch(conversations, completions, tensors[str(i)], places, **optional))
    return batches


def conversation_of(row: dict[str, Any]) -> Conversation:
    """What `dataclasses.asdict` and JSON made of a conversation, as one again."""
    if row.get("teacher_view") is not None:
        row = {**row, "teacher_view": conversation_of(row["teacher_view"])}
    lists = {k: None if row[k] is None else tuple(row[k]) for k in ("messages", "tools")}
    return Conversation(**{**row, **lists})
