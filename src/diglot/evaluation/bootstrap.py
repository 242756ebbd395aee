"""How sure is a ratio of totals? Intervals from drawing the samples again, with replacement."""

from __future__ import annotations

import math

import numpy as np

from diglot.evaluation.reports import Sums, ratio


def interval(top: Sums, bottom: Sums, *, seed: int = 0, draws: int = 1000, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of `ratio(top, bottom)` over samples `[M]`; (NaN, NaN) for fewer than two.

    The samples are the rows of a dataset: a draw takes whole rows, so tokens of one text stay together
    (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13).
    """
    if len(top) < 2 or not bottom.sum():
        return math.nan, math.nan
    counts = np.random.default_rng(seed).multinomial(len(top), np.full(len(top), 1 / len(top)), size=draws)
    below = counts @ bottom
    ratios = (counts @ top)[below != 0] / below[below != 0]
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def with_interval(top: Sums, bottom: Sums, seed: int = 0) -> tuple[float, float, float]:
    """The ratio and its 95% interval."""
    return ratio(top, bottom), *interval(top, bottom, seed=seed)
