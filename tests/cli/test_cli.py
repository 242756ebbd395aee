"""The command line: fast help, strict keys, recipes, and one real run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import tiny

from diglot.checkpoints import durable
from diglot.cli.main import main
from diglot.cli.options import SCHEMA, generate, load_options
from diglot.cli.parsing import parse_train
from diglot.errors import ConfigError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A student and a teacher on disk, each with its tokenizer, and data."""
    return tiny.save_pair(tmp_path_factory.mktemp("models"))


def arguments(folders: dict[str, str], out: Path, *more: str) -> list[str]:
    return [
        "train", "--model_name_or_path", folders["student"], "--teacher_model_name_or_path", folders["teacher"],
        "--dataset_name", folders["data.jsonl"], "--output_dir", str(out), "--max_steps", "2", "--use_cpu",
        "--per_device_train_batch_size", "4", "--max_completion_length", "6", "--logging_steps", "1", "--disable_tqdm",
        "--report_to", "none", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"]])
def test_help_answers_within_a_second_and_loads_no_torch(command: list[str]) -> None:
    code = (
        "import sys; from diglot.cli.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    best = 9.0
    for _ in range(3):  # the machine may be busy; help is fast if it is once
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
        best = min(best, time.monotonic() - start)
        assert done.returncode == 0, done.stderr
    assert best < 1.0
    assert "usage: diglot" in done.stdout


def help_of_train(option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main(["train", option])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "%%" not in text and "(default: None)" not in text
    return text


def options_in(text: str) -> list[str]:
    return re.findall(r"^  --([\w-]+)", text, re.M)


def test_help_is_two_screens_of_what_matters_most_used_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of_train("--help", capsys, monkeypatch)
    assert len(text.splitlines()) <= 120 and max(map(len, text.splitlines())) <= 80
    shown = options_in(text)
    assert 25 <= len(shown) <= 36 and len(set(shown)) == len(shown)
    first = ["model_name_or_path", "teacher_model_name_or_path", "dataset_name", "output_dir"]
    assert [name for name in shown if name in load_options()][:4] == first
    assert (
        text.index("\nModels and data:") < text.index("\nMethod:") < text.index("\nTraining:") < text.index("example:")
    )
    assert "--help-all" in text


def test_help_all_shows_every_option_once_in_one_spelling(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of_train("--help-all", capsys, monkeypatch)
    places = [
        text.index(f"\n{g}:") for g in ("Student", "Teacher", "Data", "Objective", "Generation", "Training", "Logging")
    ]
    assert places == sorted(places) and text.index("example:") > places[-1]
    assert sorted(options_in(text)) == sorted([*load_options(), "config", "help-all"])


def test_both_spellings_are_understood_though_one_is_shown() -> None:
    arguments = ["--learning-rate", "1e-3", "--max_steps", "2", "--no-bf16", "--resume_from_checkpoint"]
    assert parse_train(arguments) == {
        "learning_rate": 1e-3, "max_steps": 2, "bf16": False, "resume_from_checkpoint": "true"
    }  # fmt: skip


def test_the_committed_schema_is_what_the_dataclasses_say() -> None:
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == json.loads(json.dumps(generate()))


def test_a_mapping_that_the_help_shows_is_one_that_the_option_takes() -> None:
    shown = [(o, text) for o in load_options().values() for text in re.findall(r"\{[^{}]*:[^{}]*\}", o.help)]
    assert {o.name for o, _ in shown} >= {"chat_template_kwargs", "tokenizer_kwargs"}
    for option, text in shown:
        assert isinstance(parse_train([f"--{option.name}", text])[option.name], dict), option.name


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("chat_template_kwargs", "{enable_thinking: false}"),
        ("objective", "[covering, byte]"),
        ("objective", "{'a': 1}"),
    ],
)
def test_what_was_meant_as_json_is_never_taken_for_a_name(option: str, text: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{option} is .* not valid JSON.*double quotes"):
        parse_train([f"--{option}", text])
    assert parse_train(["--dataset_name", "[a] b.jsonl"]) == {"dataset_name": "[a] b.jsonl"}  # a file may be called so


def test_every_option_of_ours_has_help() -> None:
    assert [o.name for o in load_options().values() if o.group not in ("Training", "Logging") and not o.help] == []


@pytest.mark.parametrize(("arguments", "message"), [
    (["--lambda", "1"], "did you mean 'lmbda'"),
    (["--teacher_tokenizer", "x"], "did you mean 'teacher_tokenizer_kwargs' or 'teacher_tokenizer_name_or_path'?"),
    (["--beta", "hello"], "beta is 'hello', expected a number"),
    (["--max_steps", "1.5"], "expected a whole number"),
    (["--seq_kd", "maybe"], "expected true or false"),
    (["--score_turns", "some"], "one of last, all"),
    (["--config", "/nowhere.yaml"], "no recipe /nowhere.yaml"),
    (["stray"], "stray"),
])  # fmt: skip
def test_a_wrong_argument_is_one_message_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["train", "--output_dir", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("change", "message"), [
    ({"lmbda": 2}, "lmbda=2.0"), ({"gamma": 0.5}, "--trainer gkd"), ({"dataset_name": "/none.jsonl"}, "/none.jsonl"),
    ({"model_name_or_path": "/no/model"}, "/no/model"), ({"teacher_model_name_or_path": "/no/teacher"}, "/no/teacher"),
    ({"max_length": 5}, "max_length"), ({"objective": "strickt"}, "did you mean 'strict'"),
])  # fmt: skip
def test_values_that_cannot_work_write_nothing(
    change: dict[str, Any], message: str, folders: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    more = [text for k, v in change.items() for text in (f"--{k}", str(v))]
    assert main(arguments(folders, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_option_that_a_newer_transformers_has_is_accepted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shorter = [e for e in json.loads(SCHEMA.read_text(encoding="utf-8")) if e["name"] not in ("max_steps", "bf16")]
    (tmp_path / "options.json").write_text(json.dumps(shorter))
    (tmp_path / "r.yaml").write_text("bf16: false\n")
    monkeypatch.setattr("diglot.cli.options.SCHEMA", tmp_path / "options.json")
    load_options.cache_clear()
    try:
        assert "max_steps" not in load_options()
        arguments = ["--max-steps", "3", "--config", str(tmp_path / "r.yaml")]
        assert parse_train(arguments) == {"max_steps": 3, "bf16": False}
        with pytest.raises(ConfigError, match="'max_stepz' is no option"):
            parse_train(["--max_stepz", "3"])
    finally:
        load_options.cache_clear()


def test_an_option_that_an_older_transformers_lacks_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import diglot.cli.train as train

    monkeypatch.setattr(train, "fields", lambda cls: [f for f in fields(cls) if f.name != "bf16"])
    with pytest.raises(ConfigError, match=r"bf16: no option of the installed transformers \d"):
        train.split({"bf16": True, "output_dir": "x"})


def test_secrets_are_left_out_of_the_resolved_config_at_every_depth() -> None:
    from diglot.cli.train import resolved, split

    secret = {"token": "hf_secret", "dtype": "float32"}
    values = {"output_dir": "x", "hub_token": "hf_secret", "model_init_kwargs": secret, "use_cpu": True}
    result = resolved(*split({**values, "teacher_model_init_kwargs": dict(secret), "max_new_tokens": 5}))
    assert "hf_secret" not in yaml.safe_dump(result)
    assert result["model_init_kwargs"] == {"dtype": "float32"}
    assert result["max_new_tokens"] == 5 and "tokenizer_name_or_path" in result


def test_dashes_negations_and_types() -> None:
    options = parse_train(
        ["--learning-rate", "1e-4", "--no_disable_dropout", "--use_cpu", "--max_steps=3", "--report_to", "none",
         "--teacher_model_init_kwargs", '{"a": 1}', "--objective", '[{"name": "strict"}]']
    )  # fmt: skip
    assert options == {
        "learning_rate": 1e-4, "disable_dropout": False, "use_cpu": True, "max_steps": 3, "report_to": "none",
        "teacher_model_init_kwargs": {"a": 1}, "objective": [{"name": "strict"}],
    }  # fmt: skip


def test_a_recipe_has_the_same_keys_and_the_command_line_wins(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("lmbda: 0.25\nbeta: 1\nlearning_rate: 1e-4\nobjective:\n  - {name: strict, weight: 2.0}\n")
    options = parse_train(["--config", str(recipe), "--lmbda", "0.75"])
    assert options == {
        "lmbda": 0.75,
        "beta": 1.0,
        "learning_rate": 1e-4,
        "objective": [{"name": "strict", "weight": 2.0}],
    }


@pytest.mark.parametrize(("text", "message"), [
    ("lambda: 1\n", "did you mean 'lmbda'"), ("- a\n", "expected one"),
    ("beta: [1\n", "cannot be read at line 2, column 1"),
    ("save_strategy: no\n", "save_strategy is False, expected text. YAML reads .* put quotes"),
    ("beta: high\n", "beta is 'high'"), ("max_steps: 2.5\n", "whole number"),
])  # fmt: skip
def test_a_broken_recipe_says_where(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse_train(["--config", str(tmp_path / "r.yaml")])


def test_a_stray_word_is_no_misspelt_option() -> None:
    with pytest.raises(ConfigError, match=r"^'extra' belongs to no option\. A value stands behind its option"):
        parse_train(["--lmbda", "1", "extra"])


@pytest.mark.parametrize("trainer", ["gkd", "minillm"])
def test_a_run_trains_saves_and_writes_its_resolved_config(
    trainer: str, folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(arguments(folders, out, "--trainer", trainer, "--hub_token", "hf_secret")) == 0
    resolved = yaml.safe_load((out / "resolved_config.yaml").read_text())
    assert (
        resolved["max_steps"] == 2
        and resolved["trainer"] == trainer
        and resolved["teacher_model_name_or_path"] == folders["teacher"]
    )
    assert resolved["kd_temperature"] == 1.0  # defaults as well
    assert (out / "model.safetensors").exists() and (out / "tokenizer.json").exists()
    card = (out / "README.md").read_text()
    assert "library_name: transformers" in card and folders["student"] not in card
    written = b"".join(p.read_bytes() for p in out.rglob("*") if p.suffix in (".yaml", ".json", ".md"))
    assert b"hf_secret" not in written
    assert f"diglot report {out}" in capsys.readouterr().out


def test_a_folder_with_a_run_is_not_overwritten(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("old")
    assert main(arguments(folders, tmp_path)) == 2
    assert "holds a model already" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == "old"


def test_a_run_is_resumed_from_its_last_checkpoint(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Its files, which may be many gigabytes, are read and compared once."""
    out, read, verify = tmp_path / "run", [], durable.verify
    monkeypatch.setattr(durable, "verify", lambda folder: read.append(folder.name) or verify(folder))
    assert main(arguments(folders, out, "--save_strategy", "steps", "--save_steps", "1")) == 0
    again = ["--resume_from_checkpoint", "true", "--max_steps", "4", "--save_steps", "1", "--learning_rate", "2e-4"]
    assert main(arguments(folders, out, *again)) == 0
    assert re.search(r"resumed from +\S+/checkpoint-2", re.sub(r"\n {10,}", "", capsys.readouterr().out))
    assert sum("is resumed, but" in line for line in caplog.messages) == 1  # the learning rate is another
    assert read == ["checkpoint-2"]
    state = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4


def test_dry_run_prints_and_stops(folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folders, tmp_path / "out", "--dry_run")) == 0
    assert yaml.safe_load(capsys.readouterr().out)["max_completion_length"] == 6
    assert not (tmp_path / "out").exists()


def test_lora_from_the_command_line(folders: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "lora"
    assert main(arguments(folders, out, "--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj,v_proj")) == 0
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4


def test_unknown_commands_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trane"]) == 2
    assert "'trane'" in capsys.readouterr().err
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("diglot 0.")
