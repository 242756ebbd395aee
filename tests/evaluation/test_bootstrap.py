"""Bootstrap intervals against distributions whose spread is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diglot.evaluation.bootstrap import interval, with_interval
from diglot.evaluation.reports import ratio_error
from diglot.evaluation.texts import repetition


def test_the_interval_of_a_mean_is_as_wide_as_the_normal_distribution_says() -> None:
    """400 draws of a normal distribution: 1.96 standard errors on either side."""
    top = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    low, high = interval(top, np.ones(400), seed=1, draws=4000)
    error = top.std(ddof=1) / 20
    assert (low, high) == pytest.approx((top.mean() - 1.96 * error, top.mean() + 1.96 * error), abs=0.1 * error)


def test_nineteen_of_twenty_intervals_hold_the_true_ratio() -> None:
    """300 data sets of 80 rows, ratio 0.2, rows of unequal size: coverage within three standard errors of 95%."""
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(300):
        bottom = rng.integers(20, 200, size=80).astype(float)
        top = 0.2 * bottom + rng.normal(0, 6, size=80)
        low, high = interval(top, bottom, seed=int(rng.integers(1 << 30)), draws=400)
        hits += low <= 0.2 <= high
    assert 0.91 <= hits / 300 <= 0.98


def test_rows_are_drawn_whole_so_the_interval_agrees_with_the_linearised_error() -> None:
    rng = np.random.default_rng(3)
    bottom = rng.integers(50, 150, size=200).astype(float)
    top = bottom * rng.normal(1.0, 0.3, size=200)
    low, high = interval(top, bottom, draws=4000)
    assert (high - low) / 3.92 == pytest.approx(ratio_error(top, bottom), rel=0.08)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    top, bottom = np.arange(10.0), np.ones(10)
    assert interval(top, bottom, seed=4) == interval(top, bottom, seed=4) != interval(top, bottom, seed=5)


def test_one_row_and_nothing_below_have_no_interval() -> None:
    assert all(map(math.isnan, interval(np.ones(1), np.ones(1))))
    assert all(map(math.isnan, with_interval(np.zeros(3), np.zeros(3))))


def test_repetition_counts_windows_that_came_before() -> None:
    assert repetition("short") == (0, 0)
    assert repetition("abcdefghijklmnopqrstuvwxyz") == (0, 11)
    assert repetition("a" * 20) == (4, 5)
    looped, total = repetition("the same line again\n" * 20)
    assert total == 385 and looped == 365  # twenty windows are new, one for each place in the line
