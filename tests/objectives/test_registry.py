"""Objectives by name."""

from __future__ import annotations

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
