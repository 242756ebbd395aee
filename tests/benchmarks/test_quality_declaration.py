"""A declaration is read strictly: what cannot be run is refused with the place and the value."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest

importlib.import_module("quality")
from arms import Arm  # noqa: E402
from quality import declaration  # noqa: E402
from quality.declaration import DeclarationError, load, read  # noqa: E402

from diglot.objectives import OBJECTIVES  # noqa: E402

SMALL: dict[str, Any] = {
    "name": "small",
    "seeds": [0, 1],
    "selection": {"seed": 9, "by": "reverse_kl"},
    "default": "covering",
    "arms": {"covering": "covering", "ce": "ce@lmbda=0"},
    "pairs": {
        "one": {
            "kind": "laboratory",
            "options": {"pair": "finer"},
            "budget": {"steps": 2, "batch": 4, "items": 4},
            "rates": ["1e-3", 0.002],
            "headroom": 0.1,
        }
    },
}


def changed(place: str, value: Any) -> dict[str, Any]:
    values = copy.deepcopy(SMALL)
    *way, last = place.split("/")
    inside = values
    for key in way:
        inside = inside[key]
    inside[last] = value
    return values


@pytest.mark.parametrize("tier", ["ci", "exact", "cpu", "gpu"])
def test_every_tier_can_be_read_and_names_objectives_that_exist(tier: str) -> None:
    got = load(tier)
    assert got.name == tier and len(got.seeds) == 3
    for name, label in got.arms.items():
        terms = Arm.parse(label).options.get("objective", [])
        names = [term if isinstance(term, str) else term["name"] for term in terms]
        assert set(names) <= {*OBJECTIVES, "trl-gold"}, name
    for pair in got.pairs.values():
        assert len(pair.rates) == 3
        assert got.default in pair.arms or pair.name in got.controls


def test_a_pair_has_all_arms_unless_it_says_which_and_rates_may_be_written_as_text() -> None:
    pair = read(SMALL).pairs["one"]
    assert pair.arms == ("covering", "ce") and pair.rates == (0.001, 0.002)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("seeds", [], "seeds must be a list of different values"),
        ("seeds", [1, 1], "seeds must be a list of different values"),
        ("seeds", [True], "must be int, not True"),
        ("selection/seed", 1, r"selection: seed 1 is one of seeds \[0, 1\]"),
        ("selection/by", "length", "selection: by 'length' is not one of reverse_kl"),
        ("default", "strict", "default 'strict' is not one of covering, ce"),
        ("arms/odd", "strict:beta", "arms: odd: 'beta' in 'strict:beta' should be key=value"),
        ("arms", {}, "arms must be a table of at least one name"),
        ("pairs/one/kind", "numbers", "pairs: one: kind 'numbers' is not one of laboratory, sums, models"),
        ("pairs/one/budget/steps", 0, "pairs: one: budget: steps must be above 0, not 0"),
        ("pairs/one/budget/epochs", 1, "pairs: one: budget has unknown epochs; known are steps, batch, items"),
        ("pairs/one/rates", [0.1, 0.01], "each above the one before it"),
        ("pairs/one/rates", ["fast"], "rates must be numbers, not 'fast'"),
        ("pairs/one/headroom", 0, "headroom must be above 0, not 0"),
        ("pairs/one/arms", ["bpm"], "arms 'bpm' is not one of covering, ce"),
        ("pairs/one/control", "one", "control 'one' is not one of"),
        ("pairs/one/options", [1], "options must be a table"),
        ("tier", "ci", "declaration has unknown tier"),
    ],
)
def test_what_cannot_be_run_is_refused_with_its_place(place: str, value: Any, message: str) -> None:
    with pytest.raises(DeclarationError, match=message):
        read(changed(place, value))


def test_a_missing_part_is_named() -> None:
    values = copy.deepcopy(SMALL)
    del values["pairs"]["one"]["rates"], values["pairs"]["one"]["headroom"]
    with pytest.raises(DeclarationError, match="pairs: one lacks rates, headroom"):
        read(values)


def test_files_that_are_none_say_so(tmp_path: Path) -> None:
    with pytest.raises(DeclarationError, match="the tiers are ci, cpu, exact, gpu, smoke"):
        load("huge")
    broken = tmp_path / "broken.yaml"
    broken.write_text("arms: [")
    with pytest.raises(DeclarationError, match="is not YAML"):
        load(broken)
    assert {path.stem for path in declaration.TIERS.glob("*.yaml")} == {"ci", "exact", "cpu", "gpu", "smoke"}
