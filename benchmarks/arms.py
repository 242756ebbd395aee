"""What a benchmark compares: arms named on the command line, one file per result, tables in Markdown.

An arm is a trainer and its options: `strict`, `bpm:beta=1`, `strict+alm:weight=0.1` (several terms), `minillm`,
`minillm:num_iterations=1`, `minillm+bpm`. Options of an objective follow its name; options of the trainer follow an
`@`: `strict:residual=true@learning_rate=1e-3,lmbda=0`. Values are YAML.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import diglot
from diglot import GKDConfig, GKDTrainer, MiniLLMConfig, MiniLLMTrainer


@dataclass(frozen=True)
class Arm:
    """A trainer and the options that make it."""

    label: str
    minillm: bool
    options: dict[str, Any]

    @classmethod
    def parse(cls, label: str) -> Arm:
        """Read an arm's name. `ValueError` for one that cannot be read."""
        terms, _, of_trainer = label.partition("@")
        options: dict[str, Any] = {}
        objective: list[Any] = []
        minillm = False
        for term in terms.split("+"):
            name, _, of_term = term.partition(":")
            if not name:
                raise ValueError(f"{label!r} names no objective; write for example strict or bpm:beta=1@lmbda=0.")
            values = _values(label, of_term)
            if name == "minillm":
                minillm = True
                options |= values
            else:
                objective.append({"name": name, **values} if values else name)
        if objective:
            options["objective"] = "auto" if objective == ["auto"] else objective
        return cls(label, minillm, options | _values(label, of_trainer))

    def names(self, objective: str) -> bool:
        """Is `objective` one of its terms?"""
        terms: Any = self.options.get("objective", [])
        return terms != "auto" and objective in [term if isinstance(term, str) else term["name"] for term in terms]

    def trainer(self, student: Any, teacher: Any, common: dict[str, Any], **rest: Any) -> Any:
        """The trainer, with `common` options where the arm says nothing; on-policy if neither says otherwise."""
        if self.minillm:
            return MiniLLMTrainer(student, teacher, MiniLLMConfig(**{**common, **self.options}), **rest)
        return GKDTrainer(student, teacher, GKDConfig(**{"lmbda": 1.0, **common, **self.options}), **rest)


def _values(label: str, text: str) -> dict[str, Any]:
    values = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"{item!r} in {label!r} should be key=value.")
        number = _number(value)
        values[key] = yaml.safe_load(value) if number is None else number
    return values


def _number(value: str) -> float | None:
    """YAML takes `1e-3` for text."""
    try:
        return None if value.lstrip("-").isdigit() else float(value)
    except ValueError:
        return None


def code_digest(*more: Path) -> str:
    """A short name of Diglot's source as it is imported now, and of other files that a result depends on."""
    package = Path(diglot.__file__).parent
    hasher = hashlib.sha256()
    for path in (*sorted(package.rglob("*.py")), *more):
        hasher.update(path.name.encode() + path.read_bytes())
    return hasher.hexdigest()[:12]


@dataclass(frozen=True)
class Cells:
    """Results on disk, one JSON per cell, named by what was run and by the code that ran it.

    `any_code`: results of other code are good enough. A cell that failed is no result: it is run again.
    """

    folder: Path
    code: str
    any_code: bool = False

    def result(self, setting: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The cell's result, from disk or from `run`."""
        name = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:16]
        own = self.folder / f"{name}-{self.code}.json"
        others = sorted(self.folder.glob(f"{name}-*.json"), key=lambda path: path.stat().st_mtime)
        for path in [own] if own.exists() else others[-1:] if self.any_code else []:
            return json.loads(path.read_text())
        result = {**setting, "code": self.code, **run()}
        self.folder.mkdir(parents=True, exist_ok=True)
        part = own.with_suffix(".part")
        part.write_text(json.dumps(result, indent=1) + "\n")
        part.replace(own)
        return result


def mean_of(values: Sequence[float], digits: int = 2) -> str:
    """The mean, and each value beside it if there are several."""
    if not values:
        return "-"
    each = ", ".join(f"{value:.{digits}f}" for value in values)
    return each if len(values) == 1 else f"**{statistics.fmean(values):.{digits}f}** ({each})"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
