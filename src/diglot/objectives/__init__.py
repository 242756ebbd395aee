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
from diglot.objectives.levels import Level
from diglot.objectives.registry import OBJECTIVES, Objective, make_objective, objective_class

__all__ = [
    "OBJECTIVES",
    "ColumnObjective",
    "Level",
    "Objective",
    "Pair",
    "Part",
    "Path",
    "PathObjective",
    "ProjectedObjective",
    "RowObjective",
    "Rows",
    "SummaryObjective",
    "Tables",
    "Teller",
    "Values",
    "generalized_jsd",
    "make_objective",
    "objective_class",
]
