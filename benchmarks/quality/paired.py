"""How sure is a difference between two arms? Paired bootstrap over seeds and held-out items, and Holm's correction.

Seeds and items are crossed: each seed's student was measured on the same items. A draw takes seeds and items with
replacement, independently (Owen, The pigeonhole bootstrap, 2007), and both arms of a difference take the same draw
(Efron and Tibshirani, An Introduction to the Bootstrap, 1993). With three seeds an interval is rough: a draw has ten
different choices of seeds, so it is shown how many seeds agree in sign.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
DRAWS = 10_000


@dataclass(frozen=True)
class Sums:
    """A measure of one arm: what is above and below the line, `[seeds, items]` each."""

    top: Floats
    bottom: Floats

    @property
    def each(self) -> Floats:
        """The value of each seed, `[seeds]`."""
        return self.top.sum(1) / self.bottom.sum(1)

    @property
    def value(self) -> float:
        """The mean over seeds."""
        return float(self.each.mean())


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, and in how many of the seeds it has its sign."""

    value: float
    low: float
    high: float
    p: float = float("nan")  # two-sided, of a difference
    agreeing: int = 0
    seeds: int = 0


def interval(sums: Sums, *, draws: int = DRAWS, seed: int = 0, level: float = 0.95) -> Estimate:
    """The mean over seeds with its percentile interval."""
    values = _drawn([sums], draws, seed)[0]
    low, high = _bounds(values, level)
    return Estimate(sums.value, low, high, seeds=len(sums.top))


def difference(arm: Sums, other: Sums, *, draws: int = DRAWS, seed: int = 0, level: float = 0.95) -> Estimate:
    """`arm - other`, paired by seed and item; `p` is two-sided, and never 0: at least `2 / (draws + 1)`.

    Raises:
        ValueError: the two were not measured with the same number of seeds, or on the same number of items.
    """
    if arm.top.shape != other.top.shape:
        raise ValueError(
            f"cannot pair (seeds, items) {arm.top.shape} with {other.top.shape}: run the seeds and items that one lacks"
        )
    of_arm, of_other = _drawn([arm, other], draws, seed)
    values = of_arm - of_other
    low, high = _bounds(values, level)
    each = arm.each - other.each
    smaller = min((values <= 0).sum(), (values >= 0).sum())
    p = min(1.0, 2 * (int(smaller) + 1) / (draws + 1))
    agreeing = int((np.sign(each) == np.sign(each.mean())).sum())
    return Estimate(float(each.mean()), low, high, p, agreeing, len(each))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted for their number, in the same order (Holm, 1979): all comparisons are right together at that level."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    adjusted: dict[str, float] = {}
    highest = 0.0
    for rank, name in enumerate(ordered):
        highest = max(highest, min(1.0, (len(ordered) - rank) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def _drawn(arms: Sequence[Sums], draws: int, seed: int) -> list[Floats]:
    """The mean over drawn seeds of the ratio over drawn items, `[draws]` for each arm, by the same draws."""
    seeds, items = arms[0].top.shape
    draw = np.random.default_rng(seed)
    of_items = draw.multinomial(items, np.full(items, 1 / items), size=draws).astype(np.float64)
    of_seeds = draw.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds
    drawn = []
    for arm in arms:
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios = (of_items @ arm.top.T) / (of_items @ arm.bottom.T)  # [draws, seeds]
        drawn.append((of_seeds * ratios).sum(1))
    return drawn


def _bounds(values: Floats, level: float) -> tuple[float, float]:
    """Percentiles of the draws whose ratio exists."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
