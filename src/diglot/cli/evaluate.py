"""`diglot eval`: numbers of one model or several that do not depend on a tokenizer."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from diglot.cli.loading import (
    add_data_options,
    add_rendering_options,
    add_tokenizer_options,
    check_counts,
    check_place,
    data_options,
    load_model,
    rendering_options,
)
from diglot.cli.names import check_data, check_model_name
from diglot.cli.parsing import Parser
from diglot.cli.screen import show_phases
from diglot.errors import ConfigError
from diglot.phases import LOADING, phase

EXAMPLE = """example:
  diglot eval runs/first --teacher Qwen/Qwen2.5-1.5B-Instruct \\
      --data heldout.jsonl
"""


def evaluate(arguments: Sequence[str]) -> int:
    """Measure every model on the same rows with the same seed, and print a table or JSON."""
    options = parser().parse_args(arguments)
    check_counts(options, "rows", "max_completion_length", "batch_size")
    if options.lm_eval_tasks and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            f"--lm_eval_tasks {options.lm_eval_tasks} needs lm-eval, which is not installed. "
            "Run: pip install 'lm-eval[hf]'."
        )
    if options.lm_eval_tasks and options.tokenizer_kwargs:
        raise ConfigError(
            f"--tokenizer_kwargs {json.dumps(options.tokenizer_kwargs)} would not reach --lm_eval_tasks "
            f"{options.lm_eval_tasks}: lm-eval loads the tokenizer itself. Give them in two commands."
        )
    check_data(options.data, "--data")
    for name in options.models:
        check_model_name(name, "model", "MODEL")
    if options.teacher is not None:
        check_model_name(options.teacher, "teacher", "--teacher")
    show_phases()
    with phase(LOADING):
        from diglot.evaluation import battery  # noqa: F401
    check_place(options.device, options.dtype)
    by_model = _measure(options)
    if options.lm_eval_tasks:
        for name, one in by_model.items():
            one["lm_eval"] = lm_eval(name, options.lm_eval_tasks, options.batch_size, options.device)
    if options.json:
        print(json.dumps({"data": options.data, "teacher": options.teacher, "models": by_model}, indent=2))
    else:
        _print(by_model)
    return 0


def parser() -> Parser:
    """The parser of the command."""
    parser = Parser(
        prog="diglot eval",
        usage="diglot eval MODEL [MODEL ...] --data NAME [--OPTION VALUE ...]",
        description="Numbers that do not depend on a tokenizer, with 95% bootstrap intervals over the rows.",
        epilog=EXAMPLE,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a model id or a folder; several are compared")
    parser.add_argument("--teacher", help="what to compare each of them with: divergences, agreement, stops")
    parser.add_argument("--data", required=True, help="a hub id, a JSONL, Parquet or CSV file, or a folder")
    add_data_options(parser)
    add_rendering_options(parser)
    add_tokenizer_options(parser, "student", "teacher")
    parser.add_argument("--split", default="train", help="split of the data (default: train, as a single file has)")
    parser.add_argument("--rows", type=int, default=64, help="how many rows are read (default: 64)")
    parser.add_argument("--max_completion_length", type=int, default=128, help="tokens of a sample (default: 128)")
    parser.add_argument("--batch_size", type=int, default=8, help="rows at a time (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of samples, places and intervals (default: 0)")
    parser.add_argument("--device", help="where to run (default: cuda if there is one, else cpu)")
    parser.add_argument("--dtype", default="auto", help="number type of the weights (default: the file's own)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the models")
    parser.add_argument("--lm_eval_tasks", metavar="A,B", help="also run these tasks of lm-eval, if it is installed")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    return parser


def _measure(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Model -> measure -> value, interval and unit."""
    from diglot.data import load_dataset, to_sample
    from diglot.evaluation.battery import Plan, measure

    rows = islice(load_dataset(options.data, split=options.split, **data_options(options)), options.rows)
    samples = [to_sample(row, where=f"row {i}") for i, row in enumerate(rows)]
    plan = Plan(options.max_completion_length, options.batch_size, seed=options.seed)
    teacher = (
        None
        if options.teacher is None
        else _load(options.teacher, "teacher", options, options.teacher_tokenizer_kwargs)
    )
    by_model = {}
    for name in options.models:
        side = _load(name, "student", options, options.tokenizer_kwargs)
        with phase(f"Measuring {name} on {len(samples)} rows"):
            measures = measure(side, teacher, samples, plan)
        by_model[name] = {key: one.as_json() for key, one in measures.items()}
    return by_model


def _load(name: str, role: str, options: argparse.Namespace, arguments: Mapping[str, Any]) -> Any:
    """A model in evaluation mode on the device, with its own tokenizer."""
    from diglot.evaluation.battery import Side
    from diglot.rendering import Renderer
    from diglot.vocabulary import load_tokenizer

    with phase(f"Loading the {role} {name}"):
        model = load_model(name, options.device, options.dtype, options.trust_remote_code)
    tokenizer = load_tokenizer(name, arguments, trust_remote_code=options.trust_remote_code)
    return Side(name, model, Renderer.of_model(model, tokenizer, name=name, **rendering_options(options)))


def lm_eval(model: str, tasks: str, batch_size: int, device: str | None = None) -> dict[str, Any]:
    """The results of lm-eval's `tasks` on a model, by task. It runs in a process of its own.

    Raises:
        ConfigError: it ended with an error, or wrote no results.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model}"]
        command += ["--tasks", tasks, "--batch_size", str(batch_size), "--output_path", folder]
        command += ["--device", device] if device else []
        done = subprocess.run(command, capture_output=True, text=True)
        written = sorted(Path(folder).rglob("results*.json"))
        if done.returncode or not written:
            raise ConfigError(
                f"lm-eval ended with code {done.returncode} for {model} and tasks {tasks}: "
                f"{done.stderr.strip()[-800:]} Try the same alone: {' '.join(command)}"
            )
        results: dict[str, Any] = json.loads(written[-1].read_text(encoding="utf-8"))["results"]
        return results


def _print(by_model: dict[str, dict[str, Any]]) -> None:
    """One column for each model, with units below the names of measures. Names are data, never markup."""
    from rich.text import Text

    table = Table(title="95% intervals over rows")
    table.add_column("measure", overflow="fold", width=24)  # its names are never broken
    for name in _headings(list(by_model)):
        table.add_column(Text(name), justify="right", overflow="fold")
    names = list(dict.fromkeys(key for one in by_model.values() for key in one if key != "lm_eval"))
    for key in names:
        units = [one[key]["unit"] for one in by_model.values() if key in one]
        measure = Text.assemble(key, "\n  ", (units[0], "dim"))
        table.add_row(measure, *(_cell(one.get(key)) for one in by_model.values()))
    Console().print(table)
    for name, one in by_model.items():
        for task, results in one.get("lm_eval", {}).items():
            shown = {k: v for k, v in results.items() if isinstance(v, float)}
            Console().print(Text(f"{name}  {task}: " + ", ".join(f"{k} {v:.4f}" for k, v in shown.items())))


def _headings(names: Sequence[str]) -> list[str]:
    """How each model is called in the table: as given, or the last part of a long path where that tells them apart."""
    from diglot.report.card import shown_name

    short = [name if len(name) <= 20 else shown_name(name) for name in names]
    return short if len(set(short)) == len(short) else list(names)


def _cell(measure: dict[str, Any] | None) -> str:
    if measure is None or measure["value"] is None:
        return ""
    text = f"{measure['value']:.4g}"
    return text if measure["low"] is None else f"{text}\n[{measure['low']:.3g}, {measure['high']:.3g}]"
