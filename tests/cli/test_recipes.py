"""Recipes and the schema of the configuration."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from diglot.cli.main import main
from diglot.cli.options import load_options
from diglot.cli.parsing import parse_train
from diglot.cli.recipes import load_launches, load_recipes
from diglot.cli.schema import config_schema

RECIPES = load_recipes()


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = config_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid_and_is_read_as_written(
    name: str, validator: jsonschema.Draft202012Validator, tmp_path: Path
) -> None:
    options = yaml.safe_load(RECIPES[name])
    assert [error.message for error in validator.iter_errors(options)] == []
    (tmp_path / "r.yaml").write_text(RECIPES[name])
    assert parse_train(["--config", str(tmp_path / "r.yaml")]) == options


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_what_it_needs_and_how_it_is_run(name: str) -> None:
    header = [line for line in RECIPES[name].splitlines() if line.startswith("#")]
    assert header[0].endswith(".") and any(line.startswith("# Needs: ") for line in header)
    (run,) = (line for line in header if line.startswith("# Run: "))
    assert f"diglot train --config {name}.yaml" in run
    options = yaml.safe_load(RECIPES[name])
    assert {
        "trainer",
        "model_name_or_path",
        "teacher_model_name_or_path",
        "dataset_name",
        "output_dir",
    } <= options.keys()


@pytest.mark.parametrize(("change", "where"), [
    ({"lambda": 1}, "'lambda' was unexpected"), ({"beta": "high"}, "'high'"), ({"max_steps": 1.5}, "1.5"),
    ({"score_turns": "some"}, "'some'"), ({"objective": "strickt"}, "'strickt'"), ({"seq_kd": "maybe"}, "'maybe'"),
    ({"objective": [{"weight": 1.0}]}, "weight"), ({"gamma": 0.9}, "False schema"),
    ({"trainer": "minillm", "lmbda": 1.0}, "False schema"), ({"max_length": "long"}, "'long'"),
])  # fmt: skip
def test_the_schema_refuses_what_the_command_refuses(
    change: dict[str, Any], where: str, validator: jsonschema.Draft202012Validator
) -> None:
    errors = list(validator.iter_errors(change))
    assert errors and where in " ".join(error.message for error in errors)


@pytest.mark.parametrize("arguments", [
    {"trainer": "minillm", "gamma": 0.9}, {"lmbda": 0.5}, {"learning_rate": "1e-5"}, {"max_length": None},
    {"objective": [{"name": "strict", "weight": 0.5, "top_k": 4}, "alm"]}, {"report_to": ["tensorboard"]}, {},
])  # fmt: skip
def test_the_schema_accepts_what_the_command_accepts(
    arguments: dict[str, Any], validator: jsonschema.Draft202012Validator
) -> None:
    assert [error.message for error in validator.iter_errors(arguments)] == []


def test_the_schema_has_every_option_with_its_default_and_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config-schema"]) == 0
    output = capsys.readouterr()
    schema = json.loads(output.out)
    assert output.err.startswith("Loading torch")  # which takes seconds
    assert schema["$schema"].endswith("2020-12/schema")
    properties = schema["properties"]
    assert properties.keys() == load_options().keys()
    for name, option in load_options().items():
        assert properties[name]["default"] == option.default
        assert properties[name].get("description", "").startswith(option.help)


def test_defaults_are_valid(validator: jsonschema.Draft202012Validator) -> None:
    own = {n: o for n, o in load_options().items() if o.group not in ("Training", "Logging") and "gkd" in o.trainers}
    assert [e.message for e in validator.iter_errors({n: o.default for n, o in own.items()})] == []


def test_list_names_every_recipe_with_its_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "list"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    recipes, launches = (part.splitlines() for part in re.sub(r"\n {9,}", " ", text).split("\n\n"))
    assert [line.split()[0] for line in recipes] == list(RECIPES)
    assert launches[0] == "for accelerate launch --config_file:"
    assert [line.split()[0] for line in launches[1:]] == list(load_launches())
    assert len(RECIPES) >= 7 and all(line.endswith(".") for line in [*recipes, *launches[1:]])


def test_show_prints_a_recipe_and_copy_writes_it_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["recipes", "show", "minillm"]) == 0
    assert capsys.readouterr().out == RECIPES["minillm"]
    target = tmp_path / "mine.yaml"
    assert main(["recipes", "copy", "minillm", str(target)]) == 0
    assert target.read_text() == RECIPES["minillm"]
    target.write_text("kept")
    assert main(["recipes", "copy", "minillm", str(target)]) == 2
    assert "exists already" in capsys.readouterr().err and target.read_text() == "kept"


@pytest.mark.parametrize("arguments", [["show", "nothing"], ["copy", "nothing"], ["lst"], []])
def test_a_wrong_recipe_or_action_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", *arguments]) == 2
    assert capsys.readouterr().err.startswith("diglot: ")


@pytest.mark.parametrize("name", load_launches())
def test_accelerate_reads_every_configuration_that_is_named_for_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    target = tmp_path / "launch.yaml"
    assert main(["recipes", "copy", name, str(target)]) == 0
    config: Any = load_config_from_file(str(target))
    assert config.num_processes == 8 * config.num_machines and not config.use_cpu
    if "fsdp" in name:
        assert config.distributed_type.value == "FSDP" and config.fsdp_config["fsdp_version"] == 2
    output = capsys.readouterr().out
    assert "accelerate launch" in output and main(["recipes", "list"]) == 0
    assert name in capsys.readouterr().out
