"""What a run left in its folder, as a report reads it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from diglot.errors import DataError
from diglot.report.records import METRICS, ROLLOUTS, Record, read

CONFIG, INSPECTION = "resolved_config.yaml", "inspection.json"


@dataclass(frozen=True)
class Run:
    """One run. `logs` are lines of training and evaluation, `fixed` those before the first step and after the last."""

    name: str
    logs: list[Record]
    fixed: list[Record]
    rollouts: list[Record]
    config: dict[str, Any] = field(default_factory=dict)
    inspection: Any = None

    @property
    def steps(self) -> int:
        """Optimizer steps that were logged."""
        return max((record["step"] for record in [*self.logs, *self.fixed]), default=0)

    def series(self, *names: str) -> tuple[list[int], list[float]]:
        """Steps and values of the first of `names` that was logged; `*` in front stands for any `eval_...` prefix."""
        for name in names:
            points = [(r["step"], value) for r in self.logs if (value := _value(r, name)) is not None]
            if points:
                steps, values = zip(*points, strict=True)
                return list(steps), list(values)
        return [], []

    def before_after(self, name: str) -> tuple[float | None, float | None]:
        """A metric of the fixed prompts before the first step and after the last one."""
        by_phase = {r["phase"]: r.get(name) for r in self.fixed}
        return by_phase.get("before"), by_phase.get("after")

    def rollouts_in(self, phase: str) -> list[Record]:
        """The rollouts of "before", "training" or "after"; of a run that went on, the last "after"."""
        rollouts = [r for r in self.rollouts if r["phase"] == phase]
        last = max((r["step"] for r in rollouts), default=0)
        return rollouts if phase == "training" else [r for r in rollouts if r["step"] == last]


def load_run(folder: Path) -> Run:
    """Read a run's folder. `DataError` if it holds no metrics, or a file in it cannot be read."""
    if not (folder / METRICS).exists():
        raise DataError(
            f"{folder} holds no {METRICS}, so it is no run of Diglot, or one that was stopped before its first log. "
            "Give the output_dir of a run."
        )
    try:
        metrics, rollouts = read(folder / METRICS), read(folder / ROLLOUTS)
        config = yaml.safe_load(_text(folder / CONFIG) or "{}") or {}
        inspection = json.loads(_text(folder / INSPECTION) or "null")
        _check(metrics, ("step",), METRICS)
        _check(rollouts, ("step", "phase", "place", "prompt", "chunks"), ROLLOUTS)
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(f"A file of the run {folder} cannot be read: {error}") from error
    return Run(
        folder.resolve().name,
        [r for r in metrics if "phase" not in r],
        [r for r in metrics if "phase" in r],
        rollouts,
        config if isinstance(config, dict) else {},
        inspection,
    )


def gap_of(chunk: Record) -> float | None:
    """log p_teacher - log p_student of a chunk of a rollout, nats; None where the sides cannot be compared."""
    known = chunk["comparable"] and chunk["logp_s"] is not None and chunk["logp_t"] is not None
    return chunk["logp_t"] - chunk["logp_s"] if known else None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _check(records: Sequence[Any], needed: Sequence[str], name: str) -> None:
    for number, record in enumerate(records, start=1):
        missing = [key for key in needed if not isinstance(record, dict) or key not in record]
        if missing:
            raise ValueError(f"entry {number} of {name} has no {', '.join(missing)}")


def _value(record: Record, name: str) -> float | None:
    if name.startswith("*"):
        names = [key for key in record if key.startswith("eval_") and key.endswith(name[1:])]
        name = names[0] if names else name
    value = record.get(name)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
