"""The testbed's statistics against values that were worked out by hand."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

importlib.import_module("quality")
from quality.paired import Sums, difference, holm, interval  # noqa: E402


def sums(top: list[list[float]], bottom: list[list[float]] | None = None) -> Sums:
    above = np.array(top, dtype=float)
    return Sums(above, np.ones_like(above) if bottom is None else np.array(bottom, dtype=float))


def test_a_value_is_the_mean_over_seeds_of_the_ratio_of_totals() -> None:
    two = sums([[1, 9], [2, 4]], [[1, 3], [1, 1]])  # 10 / 4 and 6 / 2
    assert two.each.tolist() == [2.5, 3.0] and two.value == 2.75


def test_an_interval_covers_what_drawing_items_again_gives() -> None:
    """Two items, 0 and 1: a draw's mean is 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4."""
    got = interval(sums([[0, 1]]))
    assert (got.value, got.low, got.high) == (0.5, 0.0, 1.0)
    half = interval(sums([[0, 1]]), level=0.4)  # 30 % and 70 % of the draws: both lie in the half that gives 1/2
    assert (half.low, half.high) == (0.5, 0.5)


def test_seeds_are_drawn_as_well() -> None:
    """One item, two seeds: the mean of two draws of a seed."""
    got = interval(sums([[0], [2]]))
    assert (got.value, got.low, got.high, got.seeds) == (1.0, 0.0, 2.0, 2)


def test_a_constant_difference_has_no_width_however_much_the_items_vary() -> None:
    """Unpaired, the same arms would differ by less than their noise."""
    base = np.random.default_rng(0).normal(size=(3, 50)) * 10
    got = difference(sums((base + 0.25).tolist()), sums(base.tolist()), draws=999)
    assert (got.value, got.low, got.high) == pytest.approx((0.25, 0.25, 0.25))
    assert got.p == pytest.approx(2 / 1000) and (got.agreeing, got.seeds) == (3, 3)


def test_p_is_twice_the_share_of_draws_on_the_other_side() -> None:
    """Items +1 and -1/2: draws give 1, 1/4, -1/2 with 1/4, 1/2, 1/4, so a quarter is not above 0."""
    got = difference(sums([[1, -0.5]]), sums([[0, 0]]))
    assert got.value == 0.25 and got.p == pytest.approx(0.5, abs=0.02)
    assert difference(sums([[1, 1]]), sums([[1, 1]])).p == 1.0


def test_what_was_not_measured_alike_is_not_paired() -> None:
    with pytest.raises(ValueError, match=r"cannot pair .*\(1, 2\) with \(2, 2\)"):
        difference(sums([[0, 1]]), sums([[0, 1], [0, 1]]))


def test_holm_multiplies_the_smallest_by_all_and_never_falls() -> None:
    """0.01 x 3, 0.02 x 2 and 0.03 x 1, which may not be below the one before it."""
    assert holm({"a": 0.03, "b": 0.01, "c": 0.02}) == pytest.approx({"a": 0.04, "b": 0.03, "c": 0.04})
    assert list(holm({"a": 0.03, "b": 0.01})) == ["a", "b"]
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0} and holm({}) == {}
