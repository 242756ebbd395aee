"""How far apart are student and teacher, in nats? Pure functions on tensors, unreduced."""

from __future__ import annotations

from diglot.objectives.base import (
    ColumnObjective,
    Objective,
    PathObjective,
    ProjectedObjective,
    RowObjective,
    SummaryObjective,
)
from diglot.objectives.divergences import generalized_jsd
from diglot.objectives.levels import Level
from diglot.objectives.pair import Pair, Tables
from diglot.objectives.policy_gradient import PolicyGradient
from diglot.objectives.registry import OBJECTIVES, make_objective, objective_class, options_of
from diglot.objectives.scores import Metrics, Part, Path, Plan, Rollout, Rows, Scores, Values

__all__ = [
    "OBJECTIVES",
    "ColumnObjective",
    "Level",
    "Metrics",
    "Objective",
    "Pair",
    "Part",
    "Path",
    "PathObjective",
    "Plan",
    "PolicyGradient",
    "ProjectedObjective",
    "Rollout",
    "RowObjective",
    "Rows",
    "Scores",
    "SummaryObjective",
    "Tables",
    "Values",
    "generalized_jsd",
    "make_objective",
    "objective_class",
    "options_of",
]
