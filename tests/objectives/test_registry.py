"""Objectives by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diglot.errors import ConfigError
from diglot.objectives import OBJECTIVES, Level, Objective, Pair, PathObjective, make_objective, objective_class

PAIR = Pair(False, 4, 5, torch.tensor([0, 1]), torch.tensor([2, 1]), torch.tensor([3]), torch.tensor([4]))


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_each_objective_knows_its_name_and_what_it_needs(name: str) -> None:
    cls = objective_class(name)
    assert cls.name == name
    of_rows = {"top_k": Level.TOP_K, "strict": Level.CHOSEN}.get(name, Level.HIDDEN)
    assert cls.needs == (Level.TEXT_LOGPROBS if issubclass(cls, PathObjective) else of_rows)
    assert issubclass(cls, Objective)


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"no objective is called 'strickt'; did you mean 'strict'\?.*ce, covering, dskd"
    ):
        make_objective("strickt", PAIR)


def test_a_misspelt_option_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'strict' has no option 'topk'; did you mean 'top_k'\?"):
        make_objective("strict", PAIR, topk=4)
    with pytest.raises(ConfigError, match=r"'ce' has no option 'beta'; it takes none"):
        make_objective("ce", PAIR, beta=1.0)


def test_levels_are_ordered_by_what_they_give() -> None:
    assert Level.TEXT_LOGPROBS < Level.TOP_K < Level.CHOSEN < Level.HIDDEN


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("strict", {"residual": "no"}, "In objective 'strict', residual='no' is not allowed: it must be true or false"),
        ("strict", {"top_k": 1.5}, "top_k=1.5 is not allowed: it must be a whole number or none"),
        ("strict", {"beta": True}, "beta=True is not allowed: it must be a finite number"),
        ("strict", {"beta": None}, "beta=None is not allowed"),
        ("alm", {"tau": float("nan")}, "tau=nan is not allowed: it must be a finite number or none"),
        ("alm", {"threshold": "1e-3"}, "threshold='1e-3' is not allowed.*YAML reads 1e-4 as text: write 1.0e-4"),
        ("span", {"gamma": 1.5}, "gamma=1.5 is out of range"),
        ("span", {"epsilon": 0}, "epsilon=0 would leave no gradient"),
        ("span", {"reward_clip": -1.0}, "reward_clip=-1.0 would leave no gradient"),
    ],
)
def test_a_value_that_an_option_cannot_have_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_objective(name, PAIR, **options)
