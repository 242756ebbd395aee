"""How far apart are student and teacher, in nats? Pure functions on tensors, unreduced."""

from __future__ import annotations

from diglot.objectives.base import (
    ColumnObjective,
    Pair,
    Part,
    Path,
    PathObjective,
    ProjectedObjective,
    RowObjective,
    Rows,
    SummaryObjective,
    Tables,
    Teller,
    Values,
)
from diglot.objectives.divergences import generalized_jsd
from diglot.objectives.registry import OBJECTIVES, Objective, make_objective, objective_class
from diglot.objectives.rungs import Rung

__all__ = [
    "OBJECTIVES",
    "ColumnObjective",
    "Objective",
    "Pair",
    "Part",
    "Path",
    "PathObjective",
    "ProjectedObjective",
    "RowObjective",
    "Rows",
    "Rung",
    "SummaryObjective",
    "Tables",
    "Teller",
    "Values",
    "generalized_jsd",
    "make_objective",
    "objective_class",
]
