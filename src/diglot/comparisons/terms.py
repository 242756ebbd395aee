"""The loss as a weighted list of objectives."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from diglot.errors import ConfigError, TeacherError
from diglot.objectives import OBJECTIVES, Level, Objective, Pair, make_objective, options_of
from diglot.options import DistillationConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Term:
    """One weighted objective of the loss."""

    name: str
    weight: float
    objective: Objective
    prefix: str = ""  # of its metrics in the log; its name and a slash when not given
    built_in: bool = False  # part of the trainer's method, not named by `objective`

    def logged(self, metric: str) -> str:
        """The name of one of its metrics in the log."""
        return f"{self.prefix or self.name + '/'}{metric}"


@dataclass(frozen=True)
class Entry:
    """One objective as the configuration names it."""

    name: str
    weight: float
    options: Mapping[str, Any]


def entries_of(requested: Any) -> list[Entry]:
    """What `objective` asks for: a name, a mapping of name, weight and options, or a list of those.

    Raises:
        ConfigError: an entry without a name, or a weight that is no number, or below 0: it would push away.
    """
    entries: list[Entry] = []
    for one in requested if isinstance(requested, (list, tuple)) else [requested]:
        if not isinstance(one, (str, Mapping)):
            raise ConfigError(
                f"objective entry {one!r} is neither a name nor a mapping such as {{name: strict, weight: 1.0}}. "
                "A class of your own is named by its place, package.module:Class."
            )
        options = {"name": one} if isinstance(one, str) else dict(one)
        name, weight = options.pop("name", None), options.pop("weight", 1.0)
        if not isinstance(name, str):
            raise ConfigError(f"objective entry {one!r} has no name. Write {{name: strict, weight: 1.0}}.")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ConfigError(f"The weight of objective {name!r} is {weight!r}: give a number, 0 or more.")
        entries.append(Entry(name, float(weight), options))
    if not entries:
        raise ConfigError("objective is an empty list: there would be no loss. Name at least one objective.")
    return entries


def terms_of(entries: Sequence[Entry], pair: Pair, defaults: Mapping[str, Any]) -> list[Term]:
    """A term for each entry. `defaults` reach every objective that has an option of that name, unless None:
    what nobody has set is each objective's own affair."""
    terms: list[Term] = []
    for entry in entries:
        name, known = entry.name, options_of(entry.name)
        options = {k: v for k, v in defaults.items() if k in known and v is not None}
        if name == "strict" and "strict_top_k" in defaults:
            options["top_k"] = defaults["strict_top_k"]
        made = make_objective(name, pair, **{**options, **entry.options})
        shown = made.name if ":" in name else name
        taken = sum(term.name.split("#")[0] == shown for term in terms)
        terms.append(Term(f"{shown}#{taken + 1}" if taken else shown, entry.weight, made))
    return terms


def check_level(terms: Sequence[Term], offered: Level, also: Collection[str] = ()) -> None:
    """Raise `TeacherError` for a term that needs more of the teacher than it offers; `also` are served all the same."""
    for term in terms:
        if term.objective.needs > offered and term.objective.name not in also:
            fitting = [name for name, objective in OBJECTIVES.items() if objective.needs <= offered or name in also]
            raise TeacherError(
                f"Objective {term.name!r} needs {term.objective.needs.name} of the teacher, which offers "
                f"{offered.name}. These would work: {', '.join(fitting)}."
            )


def check_options(args: DistillationConfig, terms: Sequence[Term]) -> None:
    """Raise `ConfigError` for an option of objectives that was given and that no term can use.

    Warns of a cross-entropy of texts that the student has written itself.
    """
    if not any(term.weight for term in terms):
        names = ", ".join(repr(term.name) for term in terms)
        raise ConfigError(f"All weights of objective {names} are 0: there would be no loss. Raise one of them.")
    own = float(getattr(args, "lmbda", 1.0))  # MiniLLM's student writes in every step
    if own and any(term.objective.name == "ce" and term.weight and not term.built_in for term in terms):
        logger.warning(
            "Objective 'ce' imitates the text, and in %.0f%% of the steps that is the student's own sample: its "
            "expected gradient is then zero, or sharpens what the student does already. %s.",
            100 * own,
            "Set lmbda=0, or drop it" if hasattr(args, "lmbda") else "Drop it, or give such texts as lm_dataset",
        )
    references = any(term.objective.reads_references for term in terms)
    rewards = any(term.built_in and term.name == "policy_gradient" for term in terms)
    used = {
        **dict.fromkeys(("reference_model_name_or_path", "reference_teacher_model_name_or_path"), references),
        **dict.fromkeys(("gamma", "length_normalization", "whiten_advantages", "reward_clip", "epsilon"), rewards),
        "beta": any(hasattr(term.objective, "beta") for term in terms),
        "strict_top_k": any(term.objective.name == "strict" for term in terms),
        "kd_temperature": any(term.objective.at_temperature for term in terms),
    }
    for option in fields(args):
        if option.name not in used or used[option.name] or option.default is MISSING:
            continue
        if (value := getattr(args, option.name)) != option.default:
            names = ", ".join(repr(term.name) for term in terms)
            raise ConfigError(f"{option.name}={value!r} has no part in objective {names}. Drop it, or choose another.")


def defaults_of(args: DistillationConfig, beta: float | None) -> dict[str, Any]:
    """The options of objectives that stand for all of them: each reaches those that have it, if their entry has not.

    `beta` None: each objective's own.
    """
    return {"beta": beta, "kd_temperature": args.kd_temperature, "strict_top_k": args.strict_top_k}
