"""A wrong value of any argument of the commands beside `train`: one message, exit code 2, nothing written."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from support import tiny

from diglot.cli import align, evaluate, inspect, report, score
from diglot.cli.main import COMMANDS, main

PARSERS = {
    "inspect": inspect.parser, "align": align.parser, "eval": evaluate.parser, "report": report.parser,
    "score": score.parser,
}  # fmt: skip
# A command line that works; STUDENT, TEACHER, DATA, OUT and FILE are paths.
GOOD = {
    "inspect": ["STUDENT", "TEACHER", "--data", "DATA", "--with-models"],
    "align": ["STUDENT", "TEACHER", "a text"],
    "eval": ["STUDENT", "--teacher", "TEACHER", "--data", "DATA"],
    "report": ["STUDENT"],
    "score": ["--teacher", "TEACHER", "--data", "DATA", "--out", "OUT"],
}
ROWS = {
    "dataset_format": ["nonsense", "alpaca"], "dataset_columns": ["nonsense=messages", "messages=nonsense", "=,"],
    "markers": ["nonsense"],
}  # fmt: skip
TOKENIZER = {"teacher_tokenizer_kwargs": ["[1]", "{", '{"tokenizer_class": "Nonesuch"}']}
TOKENIZERS = {**TOKENIZER, "tokenizer_kwargs": TOKENIZER["teacher_tokenizer_kwargs"]}
# Wrong values of each argument, by its place in GOOD or its name.
WRONG: dict[str, dict[str, list[str]]] = {
    "inspect": {
        "student": ["/nowhere"], "teacher": ["/nowhere"], "data": ["/nowhere.jsonl", "FILE"], "split": ["nonsense"],
        "rows": ["0", "many"], "model_rows": ["0", "1.5"], "batch_size": ["-1"], "max_completion_length": ["0"],
        "dtype": ["nonsense", "nn"], "device": ["nonsense", "cuda:99"], **ROWS, **TOKENIZERS,
    },
    "align": {"student": ["/nowhere"], "teacher": ["/nowhere"]},
    "eval": {
        "models": ["/nowhere"], "teacher": ["/nowhere"], "data": ["/nowhere.jsonl", "FILE"], "split": ["nonsense"],
        "rows": ["0", "many"], "max_completion_length": ["0"], "batch_size": ["0"], "seed": ["x"],
        "device": ["nonsense"], "dtype": ["nonsense"], "lm_eval_tasks": ["nonsense"], **ROWS, **TOKENIZERS,
    },
    "report": {"run": ["/nowhere", "FILE"], "other": ["/nowhere"]},
    "score": {
        "teacher": ["/nowhere"], "data": ["/nowhere.jsonl"], "out": ["FILE"], "level": ["nonsense"], "k": ["0"],
        "dataset_train_split": ["nonsense"], "teacher_tokenizer_name_or_path": ["/nowhere"],
        "teacher_model_init_kwargs": ["[1]", "{"], "teacher_chat_template_kwargs": ["[1]"],
        "teacher_max_length": ["0"], "score_turns": ["some"], "batch_size": ["0"], "shard_texts": ["0"], **ROWS,
        **TOKENIZER,
    },
}  # fmt: skip
TEXT = "any text is right"
FREE = {  # and why no value can be told to be wrong
    "align": {"text": TEXT},
    "report": {"out": "made with its folders; STUDENT is no run, which is said first"},
    "score": {
        "dataset_config": "only the hub knows", "teacher_model_revision": "only the hub knows",
        "teacher_system_prompt": TEXT,
    },
}  # fmt: skip


def takes_a_value(action: argparse.Action) -> bool:
    return not isinstance(action, (argparse._StoreTrueAction, argparse._HelpAction))


@pytest.mark.parametrize("command", PARSERS)
def test_every_argument_has_a_wrong_value_or_a_reason_why_there_is_none(command: str) -> None:
    names = {action.dest for action in PARSERS[command]()._actions if takes_a_value(action)}
    assert names == WRONG[command].keys() | FREE.get(command, {}).keys()


@pytest.mark.parametrize(
    ("command", "name", "side"),
    [
        ("inspect", "student", "student"),
        ("inspect", "teacher", "teacher"),
        ("align", "student", "student"),
        ("align", "teacher", "teacher"),
        ("eval", "models", "model"),
        ("eval", "teacher", "teacher"),
        ("score", "teacher", "teacher"),
        ("score", "teacher_tokenizer_name_or_path", "teacher's tokenizer"),
    ],
)
def test_the_error_of_a_path_names_the_side_and_the_option(
    command: str, name: str, side: str, paths: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {**paths, "OUT": str(tmp_path / "out")}
    assert main([known.get(word, word) for word in line(command, name, "./nope")]) == 2
    action = next(a for a in PARSERS[command]()._actions if a.dest == name)
    option = action.option_strings[-1] if action.option_strings else action.metavar
    assert f"The {side} is './nope' ({option}), and there is no such folder." in capsys.readouterr().err


def test_no_command_is_forgotten() -> None:
    """Those left out take no value, or are tried in test_recipes.py, test_estimate.py and tests/engines."""
    assert COMMANDS.keys() - PARSERS.keys() == {"objectives", "recipes", "config-schema", "estimate", "serve-teacher"}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    pair = tiny.save_pair(root)
    (root / "FILE").write_text("no data")
    names = {"STUDENT": "student", "TEACHER": "teacher", "DATA": "data.jsonl"}
    return {**{name: pair[own] for name, own in names.items()}, "FILE": str(root / "FILE")}


def line(command: str, name: str, value: str) -> list[str]:
    """The good command line with one wrong value."""
    action: Any = next(a for a in PARSERS[command]()._actions if a.dest == name)
    good = list(GOOD[command])
    if action.option_strings:
        option = action.option_strings[-1]
        if option in good:
            at = good.index(option)
            del good[at : at + 2]
        return [command, *good, option, value]
    places = [a.dest for a in PARSERS[command]()._actions if not a.option_strings and takes_a_value(a)]
    good[places.index(name) : places.index(name) + 1] = [value]
    return [command, *good]


@pytest.mark.parametrize(
    ("command", "name", "value"),
    [(c, n, v) for c, names in WRONG.items() for n, values in names.items() for v in values],
)
def test_a_wrong_argument_is_refused_in_one_message(
    command: str, name: str, value: str, paths: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {**paths, "OUT": str(tmp_path / "out")}
    before = sorted(Path(paths["STUDENT"]).parent.rglob("*"))
    code = main([known.get(word, word) for word in line(command, name, value)])
    output = capsys.readouterr()
    assert code == 2, output
    assert output.err.count("diglot: ") == 1 and "Traceback" not in output.err, output.err
    assert not list(tmp_path.rglob("*")) and sorted(Path(paths["STUDENT"]).parent.rglob("*")) == before
