"""Objectives by name: Diglot's own, and a user's by the place of its class."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from diglot.errors import ConfigError
from diglot.objectives.alm import ALM
from diglot.objectives.base import Objective
from diglot.objectives.bpm import BPM
from diglot.objectives.byte import ByteDistribution
from diglot.objectives.ce import CrossEntropy
from diglot.objectives.covering import Covering
from diglot.objectives.dskd import DSKD
from diglot.objectives.escd import ESCD
from diglot.objectives.gold import Gold
from diglot.objectives.jsd import JSD
from diglot.objectives.levels import Level
from diglot.objectives.pair import Pair
from diglot.objectives.sequence_kl import SequenceKL
from diglot.objectives.shared_prefix import SharedPrefix
from diglot.objectives.simct import SimCT
from diglot.objectives.span import Span
from diglot.objectives.strict import Strict
from diglot.objectives.top_k import TopK
from diglot.objectives.uld import ULD
from diglot.objectives.xtoken import XTokenH, XTokenP
from diglot.values import check_kind

_CLASSES: tuple[type[Objective], ...] = (
    Covering, BPM, ByteDistribution, DSKD, ESCD, SharedPrefix, JSD, Strict, TopK, SequenceKL, Span, ALM, SimCT,
    CrossEntropy, XTokenP, XTokenH, ULD, Gold,
)  # fmt: skip
OBJECTIVES: dict[str, type[Objective]] = {cls.name: cls for cls in _CLASSES}


def objective_class(name: str) -> type[Objective]:
    """The class registered under `name`, or the user's own at `package.module:Class`.

    Raises:
        ConfigError: no such name (with the nearest ones), nothing at that place, or a class that is no objective.
    """
    if ":" in name:
        return _own_class(name)
    if name not in OBJECTIVES:
        raise ConfigError(f"no objective is called {name!r}; {_instead(name, OBJECTIVES)}")
    return OBJECTIVES[name]


def options_of(name: str) -> list[str]:
    """The options that an objective takes."""
    return [p for p in inspect.signature(objective_class(name)).parameters if p != "pair"]


def check_objective(name: str, options: Mapping[str, Any]) -> None:
    """What can be known of an objective before there are models.

    Raises:
        ConfigError: an unknown name or option, or a value of another kind than its annotation in the constructor.
    """
    known, parameters = options_of(name), inspect.signature(objective_class(name)).parameters
    for option, value in options.items():
        if option not in known:
            raise ConfigError(f"objective {name!r} has no option {option!r}; {_instead(option, known)}")
        if parameters[option].annotation is not inspect.Parameter.empty:
            check_kind(f"In objective {name!r}, {option}", value, parameters[option].annotation)


def make_objective(name: str, pair: Pair, **options: Any) -> Objective:
    """The objective called `name` for a pair of vocabularies.

    Raises:
        ConfigError: an unknown name or option, or a value of another kind than its annotation in the constructor.
    """
    check_objective(name, options)
    cls = objective_class(name)
    takes_pair = "pair" in inspect.signature(cls).parameters
    made: Objective = cls(pair, **options) if takes_pair else cls(**options)  # type: ignore[call-arg]
    if not isinstance(made.needs, Level):
        raise ConfigError(f"objective {name!r} needs {made.needs!r} of the teacher: it must be a diglot.Level.")
    return made


def _own_class(place: str) -> type[Objective]:
    module, _, attribute = place.partition(":")
    try:
        cls = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"objective {place!r} cannot be imported: {error}. Write package.module:Class, and see that Python finds "
            "the package (installed, or its folder in PYTHONPATH)."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Objective)):
        raise ConfigError(f"objective {place!r} is {cls!r}: it must be a class that extends diglot.Objective.")
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        raise ConfigError(f"objective {place!r} lacks {', '.join(missing)}: see docs/own-objective.md.")
    if not isinstance(getattr(cls, "name", None), str):
        raise ConfigError(f'objective {place!r} has no name for the log: write name = "..." into the class.')
    return cls


def _instead(wrong: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(wrong, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}It knows {', '.join(names)}." if names else "it takes none."
