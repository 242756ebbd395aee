"""The schema of options: generated from the dataclasses, committed, and read without importing them.

    python -m diglot.cli.options --write      # after a change to a config

The committed file is what makes `--help` and the check of a recipe fast; a test holds it against the dataclasses.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
import types
import typing
from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

SCHEMA = Path(__file__).with_name("options.json")
GROUPS = ("Student", "Teacher", "Data", "Objective", "Generation", "Training", "Logging")

_KINDS = {bool: "bool", int: "int", float: "float", str: "str", dict: "json", list: "json"}
_LOGGING = ("log", "report_to", "run_name", "project", "trackio", "disable_tqdm")


@dataclass(frozen=True)
class Option:
    """One key of the command line and of a recipe."""

    name: str
    kinds: tuple[str, ...]  # of "bool", "int", "float", "str", "json", in the order in which text is tried
    default: Any
    help: str
    group: str
    trainers: tuple[str, ...]  # which trainers know it
    choices: tuple[str, ...] | None = None


@cache
def load_options() -> dict[str, Option]:
    """Name -> option, from the committed schema."""
    return _as_options(json.loads(SCHEMA.read_text(encoding="utf-8")))


def options_for(names: Iterable[str]) -> dict[str, Option]:
    """The committed schema, and with it what else the installed transformers has, if one of `names` is among that.

    Which names it has is read from its source, so that a mistyped one does not wait for torch.
    """
    spec = importlib.util.find_spec("transformers")
    source = Path(spec.origin).with_name("training_args.py") if spec and spec.origin else None
    if source is None or not source.exists() or not set(names) & _fields_in(source):
        return load_options()
    return {**_as_options(generate()), **load_options()}


def _fields_in(source: Path) -> set[str]:
    """Names of the fields of `TrainingArguments`."""
    return {
        part.target.id
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"
        for part in node.body
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    }


def _as_options(entries: Iterable[dict[str, Any]]) -> dict[str, Option]:
    tuples = ("kinds", "trainers", "choices")
    options: dict[str, Option] = {}
    for entry in entries:
        values: dict[str, Any] = {k: tuple(v) if k in tuples and v is not None else v for k, v in entry.items()}
        options[entry["name"]] = Option(**values)
    return options


def generate() -> list[dict[str, Any]]:
    """The schema as the dataclasses say it, in order of group and name. Imports torch."""
    from diglot.cli.script import TrainArguments
    from diglot.options.config import GKDConfig, MiniLLMConfig

    entries: dict[str, dict[str, Any]] = {}
    both = ["gkd", "minillm"]
    for cls, trainers in ((TrainArguments, both), (GKDConfig, ["gkd"]), (MiniLLMConfig, ["minillm"])):
        hints = typing.get_type_hints(cls)
        for one in fields(cls):
            if not one.init or one.name in ("local_rank",):
                continue
            entry = _entry(one, hints[one.name])
            if one.name in entries:
                entries[one.name]["trainers"] = both
            else:
                entries[one.name] = {**entry, "trainers": trainers}
    return sorted(entries.values(), key=lambda e: (GROUPS.index(e["group"]), e["name"]))


def _entry(one: Field[Any], hint: Any) -> dict[str, Any]:
    default = None if one.default is MISSING else one.default
    group = one.metadata.get("group") or ("Logging" if one.name.startswith(_LOGGING) else "Training")
    return {
        "name": one.name,
        "kinds": sorted(_kinds(hint), key=["bool", "int", "float", "json", "str"].index),
        "default": default if isinstance(default, (bool, int, float, str, type(None))) else str(default),
        "help": " ".join(str(one.metadata.get("help", "")).split()).replace("%%", "%"),
        "group": group,
        "choices": list(choices) if (choices := one.metadata.get("choices")) else None,
    }


def _kinds(hint: Any) -> set[str]:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return {kind for part in typing.get_args(hint) if part is not type(None) for kind in _kinds(part)}
    return {_KINDS.get(origin or hint, "str")}


def main(arguments: list[str]) -> int:
    """Write the schema, an option a line, or say whether the committed one is up to date."""
    text = "[\n" + ",\n".join(json.dumps(one, ensure_ascii=False) for one in generate()) + "\n]\n"
    if "--write" in arguments:
        SCHEMA.write_text(text, encoding="utf-8")
        return 0
    same = SCHEMA.exists() and SCHEMA.read_text(encoding="utf-8") == text
    print("options.json is up to date." if same else "options.json is out of date: run with --write.")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
