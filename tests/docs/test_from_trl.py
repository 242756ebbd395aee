"""docs/from-trl.md has every argument of TRL's trainers, and what it says of each is so."""

from __future__ import annotations

import inspect
import os
import re
from dataclasses import MISSING, Field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import TrainingArguments

from diglot import GKDConfig, MiniLLMConfig
from diglot.cli.options import load_options
from diglot.objectives import OBJECTIVES
from diglot.trainers.base import DistillationTrainer

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
trl = pytest.importorskip("trl", reason="TRL 1.16.0 needs Python 3.11 or newer")
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "from-trl.md").read_text(encoding="utf-8")
STATUS = ("same", "renamed", "not needed", "not supported")

# Of huggingface/trl, trl/experimental/minillm/minillm_config.py, as it was before the trainer was removed.
MINILLM = {
    "teacher_model_init_kwargs": None,
    "disable_dropout": True,
    "rkl_advantage": True,
    "single_step_decomposition": True,
    "kd_temperature": 1.0,
    "gamma": 0.0,
    "length_normalization": True,
}


class Row(NamedTuple):
    status: str
    here: str


def default(one: Field[Any]) -> Any:
    return one.default_factory() if one.default_factory is not MISSING else one.default


def defaults(config: type) -> dict[str, Any]:
    return {one.name: default(one) for one in fields(config)}


def own(config: type, base: type) -> dict[str, Any]:
    """Fields that `config` adds to `base`."""
    return {name: value for name, value in defaults(config).items() if name not in defaults(base)}


@lru_cache
def cases() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Per heading: TRL's fields, and those of the class here."""
    from trl import DistillationConfig, GRPOConfig, SFTConfig
    from trl.experimental.gkd import GKDConfig as TheirGKD
    from trl.experimental.gold import GOLDConfig

    gkd, minillm = defaults(GKDConfig), defaults(MiniLLMConfig)
    return {
        "`DistillationConfig`": (own(DistillationConfig, TrainingArguments), gkd),
        "`SFTConfig`, under both GKD and GOLD": (own(SFTConfig, TrainingArguments), gkd),
        "`GKDConfig`": (own(TheirGKD, SFTConfig), gkd),
        "`GOLDConfig`": (own(GOLDConfig, SFTConfig), gkd),
        "`MiniLLMConfig`": ({**own(GRPOConfig, TrainingArguments), **MINILLM}, minillm),
    }


def section(heading: str) -> str:
    return PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def rows(heading: str) -> dict[str, Row]:
    results: dict[str, Row] = {}
    for names, status, here in re.findall(r"^\| (`.+?) \| ([a-z ]+) \| ?(.*)\|$", section(heading), re.M):
        for name in re.findall(r"`(\w+)`", names):
            assert name not in results, f"{name} stands twice under {heading}"
            results[name] = Row(status, here.strip())
    return results


HEADINGS = [
    "`DistillationConfig`",
    "`SFTConfig`, under both GKD and GOLD",
    "`GKDConfig`",
    "`GOLDConfig`",
    "`MiniLLMConfig`",
]


@pytest.mark.parametrize("heading", HEADINGS)
def test_every_field_of_trl_is_in_the_table_and_no_other(heading: str) -> None:
    assert trl.__version__ == "1.16.0"
    assert rows(heading).keys() == cases()[heading][0].keys()


@pytest.mark.parametrize("heading", HEADINGS)
def test_what_is_called_the_same_is_an_option_and_other_defaults_are_named(heading: str) -> None:
    theirs, ours = cases()[heading]
    for name, row in rows(heading).items():
        if row.status == "same":
            assert name in ours or name in load_options(), name
            if name in ours and ours[name] != theirs[name]:
                assert f"default `{ours[name]}` (TRL: {theirs[name]}" in row.here, name


@pytest.mark.parametrize("heading", HEADINGS)
def test_what_is_not_the_same_says_what_to_do_instead_or_why(heading: str) -> None:
    _, ours = cases()[heading]
    for name, row in rows(heading).items():
        assert row.status in STATUS, name
        if row.status == "renamed":
            named = set(re.findall(r"`(\w+)", row.here))
            assert named & (ours.keys() | OBJECTIVES.keys()), name
        if row.status != "same":
            assert len(row.here) > 10 and name not in ours, name


def test_training_arguments_are_options_and_the_defaults_that_differ_are_listed() -> None:
    theirs, ours = defaults(TrainingArguments), defaults(GKDConfig)
    assert theirs.keys() <= ours.keys() and theirs.keys() <= defaults(MiniLLMConfig).keys()
    listed = {
        name: (theirs_, ours_)
        for name, theirs_, ours_ in re.findall(
            r"^\| `(\w+)` \| `(.+?)` \| `(.+?)` \|$", section("`TrainingArguments`"), re.M
        )
    }
    differ = {name: (str(theirs[name]), str(ours[name])) for name in theirs if theirs[name] != ours[name]}
    assert listed == differ


def test_arguments_of_the_trainers_are_there_too() -> None:
    from trl import DistillationTrainer as TheirStable
    from trl.experimental.gkd import GKDTrainer as TheirGKD
    from trl.experimental.gold import GOLDTrainer

    known = rows("Arguments of the trainers")
    theirs = {
        name
        for trainer in (TheirStable, TheirGKD, GOLDTrainer)
        for name in inspect.signature(trainer.__init__).parameters
    }
    assert known.keys() == theirs - {"self"}
    ours = inspect.signature(DistillationTrainer.__init__).parameters
    assert all((row.status == "same") == (name in ours) for name, row in known.items())


def test_the_learning_rates_that_the_page_names_are_trls() -> None:
    from trl import DistillationConfig, GRPOConfig, SFTConfig
    from trl.experimental.gold import GOLDConfig

    assert defaults(DistillationConfig)["learning_rate"] == defaults(GRPOConfig)["learning_rate"]
    named = [float(rate) for rate in re.findall(r"(\d+e-\d) (?:in|and)", PAGE.replace("in MiniLLM,", "in MiniLLM"))]
    assert named == [defaults(c)["learning_rate"] for c in (SFTConfig, GOLDConfig, GRPOConfig)]
    for config in (SFTConfig, GRPOConfig, DistillationConfig):
        assert defaults(config)["gradient_checkpointing"] is True and defaults(config)["bf16"] is None
