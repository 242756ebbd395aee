"""Command line and recipe to checked values. Imports neither torch nor transformers."""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from diglot.cli.options import GROUPS, Option, load_options, options_for
from diglot.errors import ConfigError
from diglot.ranges import check_ranges

EXAMPLE = """example:
  diglot train --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \\
      --teacher_model_name_or_path Qwen/Qwen2.5-1.5B-Instruct \\
      --dataset_name prompts.jsonl --lmbda 1.0 --output_dir runs/first

The same keys, without dashes in front, work in a YAML file:
  diglot train --config recipe.yaml --learning_rate 2e-5
"""


class _Formatter(argparse.HelpFormatter):
    """Prose is broken at the terminal's width, indented lines (commands to copy) stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        blocks = itertools.groupby(text.splitlines(), key=lambda line: not line or line.startswith(" "))
        return "\n".join(
            line for literal, lines in blocks for line in (lines if literal else textwrap.wrap(" ".join(lines), width))
        )

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        known: dict[Any, str] = {int: "INT", float: "FLOAT", None: "TEXT"}
        return known.get(action.type, "JSON")  # no option of ours has another type


class Parser(argparse.ArgumentParser):
    """Mistakes become `ConfigError`, so that they are told like all others. Names of options are whole."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**{"formatter_class": _Formatter, "allow_abbrev": False, **keywords})

    def error(self, message: str) -> Any:
        for kind, meaning in (("int", "a whole number"), ("float", "a number")):
            message = message.replace(f"invalid {kind} value:", f"expected {meaning}, not")
        raise ConfigError(f"{message}. See `{self.prog} --help`.")


# What `--help` shows, most-used first; `--help-all` shows every option.
ESSENTIAL = {
    "Models and data": ("model_name_or_path", "teacher_model_name_or_path", "dataset_name", "output_dir"),
    "Method": (
        "trainer", "objective", "lmbda", "beta", "max_completion_length", "max_length", "temperature",
        "num_generations", "use_vllm",
    ),
    "Training": (
        "max_steps", "num_train_epochs", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps",
        "lr_scheduler_type", "bf16", "activation_checkpointing", "use_peft", "lora_r", "seed",
    ),
    "Watching and saving": (
        "logging_steps", "log_completions", "report_to", "eval_strategy", "save_steps", "save_total_limit",
        "resume_from_checkpoint", "dry_run",
    ),
}  # fmt: skip


def train_parser(options: Mapping[str, Option], whole_help: bool = False) -> argparse.ArgumentParser:
    """The parser of `diglot train`. All options are understood; the help shows the essential ones, or the whole."""
    parser = Parser(
        prog="diglot train",
        usage="diglot train [--config FILE] [--OPTION VALUE ...]",
        description="Distil a teacher into a student, on-policy, whatever their tokenizers.",
        epilog=EXAMPLE,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="A YAML file with any of these options; the command line wins."
    )
    parser.add_argument("--help-all", "--help_all", action=_HelpAll, help=f"Show all {len(options)} options and exit.")
    if whole_help:
        groups = {name: parser.add_argument_group(name) for name in GROUPS}
        for option in options.values():
            _add(groups[option.group], option, _whole_text(option))
        return parser
    for title, names in ESSENTIAL.items():
        group = parser.add_argument_group(title)
        for option in (options[name] for name in names if name in options):
            _add(group, option, _short_text(option))
    shown = {name for names in ESSENTIAL.values() for name in names}
    for option in options.values():
        if option.name not in shown:
            _add(parser, option, argparse.SUPPRESS)
    return parser


class _HelpAll(argparse._HelpAction):
    """Prints the help of the parser that shows everything. A second spelling of the option is not shown."""

    def __init__(self, option_strings: Sequence[str], *args: Any, **keywords: Any) -> None:
        super().__init__(option_strings[:1], *args, **keywords)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        train_parser(load_options(), whole_help=True).print_help()
        parser.exit()


def _short_text(option: Option) -> str:
    """The first sentence of an option's help, what it may be, and its default."""
    first, dot, _ = option.help.partition(". ")
    return f"{first}{'.' if dot else ''}{_allowed(option)}"


def _whole_text(option: Option) -> str:
    only = f" [{option.trainers[0]} only]" if len(option.trainers) == 1 else ""
    return f"{option.help}{_allowed(option)}{only}"


def _allowed(option: Option) -> str:
    known = f" One of: {', '.join(option.choices)}." if option.choices else ""
    return known + ("" if option.default in (None, "") else f" (default: {option.default})")


def _add(group: argparse._ActionsContainer, option: Option, text: str) -> None:
    """Add an option. Its name with dashes, and its negation, are understood and not shown."""
    names = [f"--{option.name}", *([f"--{option.name.replace('_', '-')}"] if "_" in option.name else [])]
    shown: dict[str, Any] = {"metavar": "TEXT" if "str" in option.kinds else option.kinds[0].upper()}
    if "bool" in option.kinds:
        shown = {"nargs": "?", "const": "true", "metavar": "true|false"}
        negated = {f"--no_{option.name}", f"--no-{option.name.replace('_', '-')}"}
        group.add_argument(
            *sorted(negated), dest=option.name, action="store_const", const="false", help=argparse.SUPPRESS
        )
    elif option.name == "resume_from_checkpoint":
        shown = {"nargs": "?", "const": "true", "metavar": "FOLDER"}
    hidden = text == argparse.SUPPRESS
    for k, name in enumerate(names):
        about = argparse.SUPPRESS if hidden or k else text.replace("%", "%%")
        group.add_argument(name, dest=option.name, help=about, **shown)


def parse_train(arguments: Sequence[str]) -> dict[str, Any]:
    """Options that were given, on the command line or in the recipe, checked and in their own types.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a value of the wrong type or out of its
            range, or an unreadable recipe.
    """
    options: Mapping[str, Option] = load_options()
    parsed, unknown = train_parser(options).parse_known_args(list(arguments))
    recipe = _recipe(Path(parsed.config)) if "config" in parsed else {}
    if missing := [*_keys(unknown), *(recipe.keys() - options.keys())]:
        options = options_for(missing)
        parsed, unknown = train_parser(options).parse_known_args(list(arguments))
    if unknown and not unknown[0].startswith("-"):
        raise ConfigError(f"{unknown[0]!r} belongs to no option. A value stands behind its option: --lmbda 1.0.")
    if unknown:
        raise ConfigError(_unknown(_keys(unknown) or [unknown[0]], "on the command line"))
    if wrong := [key for key in recipe if key not in options]:
        raise ConfigError(_unknown(wrong, f"in {parsed.config}"))
    command_line = {name: value for name, value in vars(parsed).items() if name != "config"}
    values = {name: coerce(options[name], value) for name, value in {**recipe, **command_line}.items()}
    check_ranges(values)
    return values


def _keys(unknown: Sequence[str]) -> list[str]:
    """What was meant as an option, among arguments that no option took."""
    return [text.split("=")[0].lstrip("-").replace("-", "_") for text in unknown if text.startswith("--")]


def _recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no recipe {path}. Check the path of --config.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise ConfigError(f"The recipe {path} cannot be read{place}: {error.problem}.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"The recipe {path} cannot be read: {error}") from error
    if recipe is None:
        return {}
    if not isinstance(recipe, Mapping) or not all(isinstance(key, str) for key in recipe):
        raise ConfigError(f"The recipe {path} is no mapping of options: expected one `key: value` a line.")
    return dict(recipe)


def coerce(option: Option, value: Any) -> Any:
    """`value` in the option's own type. Text is read as on the command line, wherever it comes from."""
    if value is None:
        return None
    if "json" in option.kinds and isinstance(value, str):
        _check_json(option.name, value.strip())
    for kind in option.kinds:
        done, result = _as(kind, value)
        if done and (option.choices is None or result in option.choices):
            return result
    expected = f"one of {', '.join(option.choices)}" if option.choices else " or ".join(_NAMES[k] for k in option.kinds)
    quotes = ""
    if isinstance(value, bool) and "str" in option.kinds:
        quotes = " YAML reads yes, no, on and off as true and false: put quotes around such a word."
    raise ConfigError(f"{option.name} is {value!r}, expected {expected}.{quotes}")


_NAMES = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "json": "a list or mapping",
}


def _as(kind: str, value: Any) -> tuple[bool, Any]:
    """Whether `value` can be read as `kind`, and what it is then."""
    if kind == "bool":
        if isinstance(value, bool):
            return True, value
        return (True, value.lower() == "true") if str(value).lower() in ("true", "false") else (False, None)
    if kind == "json":
        return _as_json(value)
    if kind == "str":
        return (True, value) if isinstance(value, str) else (False, None)
    if isinstance(value, bool):
        return False, None
    try:
        number = int(value) if kind == "int" else float(value)
    except (TypeError, ValueError, OverflowError):
        return False, None
    if not math.isfinite(number):
        return False, None
    return (False, None) if kind == "int" and isinstance(value, float) and value != number else (True, number)


def _check_json(name: str, text: str) -> None:
    """`ConfigError` for what was meant as a list or a mapping and is none; it would be taken for a name."""
    if text.startswith("{") or (text.startswith("[") and text.endswith("]")):
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{name} is {text!r}, which is not valid JSON: {error}. Keys and texts stand in double quotes, as in "
                """{"name": "text"}; the shell leaves them alone between single ones."""
            ) from error


def _as_json(value: Any) -> tuple[bool, Any]:
    if isinstance(value, (list, dict)):
        return True, value
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return False, None
    try:
        return True, json.loads(value)
    except json.JSONDecodeError:
        return False, None


def _unknown(keys: Iterable[str], where: str) -> str:
    parts = []
    for key in keys:
        close = difflib.get_close_matches(key, load_options(), n=2)
        longer = [name for name in close if name.startswith(key)]  # as good as each other
        near = " or ".join(map(repr, longer or close[:1]))
        parts.append(f"{key!r} is no option{f'; did you mean {near}?' if near else ''}")
    return f"{' '.join(parts)} ({where}; `diglot train --help-all` lists all)"
