"""Objectives by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

from diglot.errors import ConfigError
from diglot.objectives.alm import ALM
from diglot.objectives.base import Pair, PathObjective, ProjectedObjective, RowObjective, SummaryObjective
from diglot.objectives.bpm import BPM
from diglot.objectives.byte import ByteDistribution
from diglot.objectives.ce import CrossEntropy
from diglot.objectives.dskd import DSKD
from diglot.objectives.escd import ESCD
from diglot.objectives.gold import Gold
from diglot.objectives.jsd import JSD
from diglot.objectives.sequence_kl import SequenceKL
from diglot.objectives.shared_prefix import SharedPrefix
from diglot.objectives.simct import SimCT
from diglot.objectives.span import Span
from diglot.objectives.strict import Strict
from diglot.objectives.top_k import TopK
from diglot.objectives.uld import ULD
from diglot.objectives.xtoken import XTokenH, XTokenP

Objective = RowObjective | PathObjective | SummaryObjective | ProjectedObjective

OBJECTIVES: dict[str, type[Objective]] = {
    "bpm": BPM,
    "byte": ByteDistribution,
    "dskd": DSKD,
    "escd": ESCD,
    "shared_prefix": SharedPrefix,
    "jsd": JSD,
    "strict": Strict,
    "top_k": TopK,
    "sequence_kl": SequenceKL,
    "span": Span,
    "alm": ALM,
    "simct": SimCT,
    "ce": CrossEntropy,
    "xtoken_p": XTokenP,
    "xtoken_h": XTokenH,
    "uld": ULD,
    "gold": Gold,
}


def objective_class(name: str) -> type[Objective]:
    """The class registered under `name`. `ConfigError` with the nearest names if there is none."""
    if name not in OBJECTIVES:
        raise ConfigError(f"no objective is called {name!r}; {_instead(name, OBJECTIVES)}")
    return OBJECTIVES[name]


def make_objective(name: str, pair: Pair, **options: Any) -> Objective:
    """The objective called `name` for a pair of vocabularies. `ConfigError` for an unknown name or option."""
    cls = objective_class(name)
    known = [p for p in inspect.signature(cls).parameters if p != "pair"]
    for option in options:
        if option not in known:
            raise ConfigError(f"objective {name!r} has no option {option!r}; {_instead(option, known)}")
    return cls(**options) if issubclass(cls, PathObjective) else cls(pair, **options)


def _instead(wrong: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(wrong, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}It knows {', '.join(names)}." if names else "it takes none."
