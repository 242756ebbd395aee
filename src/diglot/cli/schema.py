"""`diglot config-schema`: the options as JSON Schema, for editors and checks of recipes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from diglot.cli.options import Option, load_options
from diglot.cli.parsing import Parser
from diglot.cli.screen import show_phases
from diglot.phases import LOADING, phase

DIALECT = "https://json-schema.org/draft/2020-12/schema"
TRAINERS = ("gkd", "minillm")

EXAMPLE = """example:
  diglot config-schema > diglot.schema.json
and as the first line of a recipe:
  # yaml-language-server: $schema=diglot.schema.json
"""

# `1e-5` is a number to an editor and text to a YAML 1.1 parser; both are read as the number.
_NUMBER_AS_TEXT = {"type": "string", "pattern": r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"}
_KINDS: dict[str, list[dict[str, Any]]] = {
    "bool": [{"type": "boolean"}],
    "int": [{"type": "integer"}],
    "float": [{"type": "number"}, _NUMBER_AS_TEXT],
    "str": [{"type": "string"}],
    "json": [{"type": "array"}, {"type": "object"}],
}


def parser() -> Parser:
    """The parser of the command."""
    return Parser(
        prog="diglot config-schema",
        description="JSON Schema (draft 2020-12) of the YAML files that `diglot train --config` reads.",
        epilog=EXAMPLE,
    )


def show(arguments: Sequence[str]) -> int:
    """Print the schema."""
    parser().parse_args(arguments)
    show_phases()
    with phase(LOADING):  # the names of objectives
        import diglot.objectives  # noqa: F401
    print(json.dumps(config_schema(), indent=1, ensure_ascii=False))
    return 0


def config_schema() -> dict[str, Any]:
    """The schema for both trainers: a key that only the other one knows is an error, as in `diglot train`."""
    options = load_options()
    only = {t: [o.name for o in options.values() if o.trainers == (t,)] for t in TRAINERS}

    def without(names: Sequence[str]) -> dict[str, Any]:
        return {"properties": dict.fromkeys(names, False)}

    minillm = {"properties": {"trainer": {"const": "minillm"}}, "required": ["trainer"]}
    return {
        "$schema": DIALECT,
        "title": "diglot train --config",
        "type": "object",
        "properties": {option.name: property_of(option) for option in options.values()},
        "additionalProperties": False,
        "if": minillm,
        "then": without(only["gkd"]),
        "else": without(only["minillm"]),
    }


def property_of(option: Option) -> dict[str, Any]:
    """One option: what it may be, its default and its help text."""
    allowed: dict[str, Any]
    if option.name == "objective":
        allowed = _objective()
    elif option.choices:
        allowed = {"enum": list(option.choices)}
    else:
        kinds = [one for kind in option.kinds for one in _KINDS[kind]]
        allowed = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
    allowed = {"anyOf": [*allowed.get("anyOf", [allowed]), {"type": "null"}]}  # as the command has it: "not given"
    about = option.help + (f" [{option.trainers[0]} only]" if len(option.trainers) == 1 else "")
    return {**allowed, "default": option.default, **({"description": about} if about else {}), "$comment": option.group}


def _objective() -> dict[str, Any]:
    """A name or a list of names and of names with weights and options."""
    from diglot.objectives import OBJECTIVES

    own = {"type": "string", "pattern": r"^[\w.]+:\w+$"}  # a class of the user's
    name = {"anyOf": [{"enum": ["auto", *OBJECTIVES]}, own]}
    entry = {"type": "object", "properties": {"name": name, "weight": {"type": "number"}}, "required": ["name"]}
    return {"anyOf": [name, {"type": "array", "items": {"anyOf": [name, entry]}, "minItems": 1}]}
