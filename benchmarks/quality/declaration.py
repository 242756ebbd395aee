"""What is to be run: a YAML file, read strictly. Whatever it does not know is an error that names the place.

    name: ci
    seeds: [0, 1, 2]
    selection: {seed: 100, by: reverse_kl}     # the rate of an arm: the best on validation, one run for each rate
    default: covering                          # the arm that the others are compared with
    arms: {covering: covering, ce: "ce@lmbda=0", trl-gold: "trl-gold:uld_use_hybrid_loss=true"}
    pairs:
      finer:
        kind: laboratory                       # or sums, or models
        options: {pair: finer}                 # of that kind
        budget: {steps: 60, batch: 16, items: 4}
        rates: [1e-3, 2e-3, 4e-3]
        headroom: 0.1                          # what the student must be away from the teacher
        control: equal                         # another pair, run with equal tokenizers
        arms: [covering, ce]                   # default: all

Arms are written as in `benchmarks/arms.py`; `trl-gold` is TRL's own trainer, with options of its config behind `:`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from arms import Arm

from .measures import KINDS

TIERS = Path(__file__).parent
PAIR_KINDS = ("laboratory", "sums", "models")


class DeclarationError(ValueError):
    """A declaration that cannot be run, with the place in it."""


@dataclass(frozen=True)
class Budget:
    """The same for every arm of a pair.

    Args:
        steps: optimizer steps.
        batch: prompts, and so completions, in each.
        items: held-out items that are measured.
    """

    steps: int
    batch: int
    items: int


@dataclass(frozen=True)
class PairDeclaration:
    """A student, a teacher and a task; see the head of this module."""

    name: str
    kind: str
    budget: Budget
    rates: tuple[float, ...]
    headroom: float
    arms: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    control: str | None = None


@dataclass(frozen=True)
class Declaration:
    """A tier."""

    name: str
    seeds: tuple[int, ...]
    selection_seed: int
    selection_by: str
    default: str
    arms: dict[str, str]
    pairs: dict[str, PairDeclaration]

    @property
    def controls(self) -> set[str]:
        """Pairs that are another pair's control."""
        return {pair.control for pair in self.pairs.values() if pair.control}


def load(source: str | Path) -> Declaration:
    """Read a tier by its name, or a file.

    Raises:
        DeclarationError: no such file, no YAML, or a value that cannot be run.
    """
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        path = TIERS / f"{source}.yaml"
    if not path.exists():
        known = ", ".join(sorted(one.stem for one in TIERS.glob("*.yaml")))
        raise DeclarationError(f"There is no declaration {str(path)!r}; the tiers are {known}, or give a file.")
    try:
        text = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DeclarationError(f"{path} is not YAML: {error}") from error
    return read(text, path.name)


def read(values: Any, where: str = "declaration") -> Declaration:
    """The declaration of plain values. Raises as `load`."""
    table = _table(values, where, ("name", "seeds", "selection", "default", "arms", "pairs"))
    selection = _table(table["selection"], f"{where}: selection", ("seed", "by"))
    arms = {name: _arm(f"{where}: arms: {name}", arm) for name, arm in _names(table["arms"], f"{where}: arms").items()}
    pairs = {
        name: _pair(name, pair, f"{where}: pairs: {name}", arms)
        for name, pair in _names(table["pairs"], f"{where}: pairs").items()
    }
    seeds = _list(table["seeds"], f"{where}: seeds", int)
    seed = _typed(selection["seed"], int, f"{where}: selection: seed")
    if seed in seeds:
        raise DeclarationError(f"{where}: selection: seed {seed} is one of seeds {list(seeds)}; choose another.")
    _one_of(selection["by"], [name for name, kind in KINDS.items() if kind.better], f"{where}: selection: by")
    _one_of(table["default"], arms, f"{where}: default")
    for name, pair in pairs.items():
        if pair.control is not None:
            _one_of(pair.control, [other for other in pairs if other != name], f"{where}: pairs: {name}: control")
    name = _typed(table["name"], str, f"{where}: name")
    return Declaration(name, seeds, seed, selection["by"], table["default"], arms, pairs)


def _pair(name: str, values: Any, where: str, arms: Mapping[str, str]) -> PairDeclaration:
    table = _table(values, where, ("kind", "budget", "rates", "headroom"), ("options", "control", "arms"))
    _one_of(table["kind"], PAIR_KINDS, f"{where}: kind")
    wanted = [one.name for one in fields(Budget)]
    budget = _table(table["budget"], f"{where}: budget", wanted)
    numbers = {key: _typed(budget[key], int, f"{where}: budget: {key}", above=0) for key in wanted}
    rates = tuple(
        _rate(rate, f"{where}: rates") for rate in _list(table["rates"], f"{where}: rates", (int, float, str))
    )
    if list(rates) != sorted(set(rates)) or rates[0] <= 0:
        raise DeclarationError(f"{where}: rates must be above 0, each above the one before it, not {list(rates)}.")
    chosen = _list(table.get("arms", list(arms)), f"{where}: arms", str)
    for arm in chosen:
        _one_of(arm, arms, f"{where}: arms")
    headroom = float(_typed(table["headroom"], (int, float), f"{where}: headroom", above=0))
    options = table.get("options") or {}
    if not isinstance(options, dict):
        raise DeclarationError(f"{where}: options must be a table, not {options!r}.")
    return PairDeclaration(
        name, table["kind"], Budget(**numbers), rates, headroom, chosen, options, table.get("control")
    )


def _rate(value: int | float | str, where: str) -> float:
    """YAML takes `1e-3` for text."""
    try:
        return float(value)
    except ValueError:
        raise DeclarationError(f"{where} must be numbers, not {value!r}.") from None


def _arm(where: str, label: Any) -> str:
    try:
        Arm.parse(_typed(label, str, where))
    except ValueError as error:
        raise DeclarationError(f"{where}: {error}") from error
    return str(label)


def _table(values: Any, where: str, needed: Sequence[str], allowed: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise DeclarationError(f"{where} must be a table with {', '.join(needed)}, not {values!r}.")
    if missing := [key for key in needed if key not in values]:
        raise DeclarationError(f"{where} lacks {', '.join(missing)}.")
    if unknown := [str(key) for key in values if key not in (*needed, *allowed)]:
        raise DeclarationError(f"{where} has unknown {', '.join(unknown)}; known are {', '.join((*needed, *allowed))}.")
    return values


def _names(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, dict) or not values or not all(isinstance(key, str) for key in values):
        raise DeclarationError(f"{where} must be a table of at least one name, not {values!r}.")
    return values


def _list(values: Any, where: str, kind: type | tuple[type, ...]) -> tuple[Any, ...]:
    if not isinstance(values, list) or not values or len(set(map(str, values))) < len(values):
        raise DeclarationError(f"{where} must be a list of different values, not {values!r}.")
    return tuple(_typed(value, kind, where) for value in values)


def _typed(value: Any, kind: type | tuple[type, ...], where: str, above: float | None = None) -> Any:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise DeclarationError(f"{where} must be {' or '.join(one.__name__ for one in kinds)}, not {value!r}.")
    if above is not None and value <= above:
        raise DeclarationError(f"{where} must be above {above:g}, not {value!r}.")
    return value


def _one_of(value: Any, known: Sequence[str] | Mapping[str, Any], where: str) -> None:
    if value not in known:
        raise DeclarationError(f"{where} {value!r} is not one of {', '.join(known)}.")
