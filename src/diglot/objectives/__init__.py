"""How far apart are student and teacher, in nats? Pure functions on tensors, unreduced."""

from __future__ import annotations

from diglot.objectives.base import (
    ColumnObjective,
    Pair,
    Path,
    PathObjective,
    RowObjective,
    Rows,
    Tables,
    Teller,
    Values,
)
from diglot.objectives.divergences import generalized_jsd
from diglot.objectives.registry import OBJECTIVES, make_objective, objective_class
from diglot.objectives.rungs import Rung

__all__ = [
    "OBJECTIVES",
    "ColumnObjective",
    "Pair",
    "Path",
    "PathObjective",
    "RowObjective",
    "Rows",
    "Rung",
    "Tables",
    "Teller",
    "Values",
    "generalized_jsd",
    "make_objective",
    "objective_class",
]
