"""The two files that a run appends to: `metrics.jsonl` and `rollouts.jsonl`, one JSON object a line.

Every line holds `step`, the number of optimizer steps that were done. A number that is not finite is written as null.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diglot.disk import finite

METRICS, ROLLOUTS = "metrics.jsonl", "rollouts.jsonl"

Record = dict[str, Any]


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line and hand it to the operating system at once: a run that is killed keeps what it wrote."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(finite(record), ensure_ascii=False, allow_nan=False, default=float)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read(path: Path) -> list[Record]:
    """All whole lines, in order; empty if there is no such file. A last line that was cut by a crash is left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError:
            if number < len(lines):
                raise ValueError(
                    f"{path}:{number} is not valid JSON: {line[:60]!r}. Delete the line to go on."
                ) from None
            continue
        if record is not None:
            records.append(record)
    return records


def keep(path: Path, wanted: Callable[[Record], bool]) -> None:
    """Drop the lines that are not `wanted`, and a cut last one; the file is replaced as a whole or not at all."""
    if not path.exists():
        return
    beside = path.with_name(path.name + ".part")
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in read(path) if wanted(record)]
    beside.write_text("".join(lines), encoding="utf-8")
    os.replace(beside, path)
