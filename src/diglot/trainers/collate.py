"""What the data workers make of rows of a dataset."""

from __future__ import annotations

from typing import Any

from diglot.data import Sample, to_sample
from diglot.rendering import Renderer


def collate_samples(rows: list[dict[str, Any]]) -> dict[str, list[Sample]]:
    """Rows of a dataset as samples; runs in the data workers."""
    return {"samples": [to_sample(row, where=f"row {row.get('__row__', i)}") for i, row in enumerate(rows)]}


def pad_id(renderer: Renderer) -> int:
    """What fills shorter rows: masked everywhere, so any id will do."""
    token = renderer.tokenizer.pad_token_id
    return token if token is not None and token < len(renderer.vocabulary) else renderer.stop_id
