"""A picture for each pair: where every arm ends, and how far that is from the default, both with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from . import paired
from .declaration import Declaration
from .measures import KINDS
from .runner import ArmResult, PairResult, sums_of
from .table import differences, title

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "quality"  # the same numbers give the same file
import matplotlib.pyplot as plt  # noqa: E402


def draw(declaration: Declaration, results: Sequence[PairResult], folder: Path) -> list[Path]:
    """Write `<tier>-<pair>.svg` for each pair with results, and return the paths."""
    drawn = []
    for result in results:
        arms = [arm for arm in result.arms if arm.cells]
        if arms and result.headroom is not None:
            path = folder / f"{declaration.name}-{result.pair.name}.svg"
            _pair(declaration.default, result, arms, path)
            drawn.append(path)
    return drawn


def _pair(default: str, result: PairResult, arms: Sequence[ArmResult], path: Path) -> None:
    assert result.headroom is not None
    names = [name for name in ("reverse_kl", "bits_per_byte", "accuracy") if name in result.headroom["before"]]
    reference = next((arm for arm in arms if arm.arm == default), None)
    rows = 2 if reference is not None and len(arms) > 1 else 1
    size = (3.2 * len(names) + 1.5, rows * (0.28 * len(arms) + 1.1))
    figure, axes = plt.subplots(rows, len(names), figsize=size, squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        before = result.headroom["before"][name]
        means = [paired.interval(sums_of([cell["after"][name] for cell in arm.cells])) for arm in arms]
        _dots(axis, [arm.arm for arm in arms], means, title(name, before))
        axis.axvline(before["value"], color="0.6", linestyle="--", linewidth=1)
        for y, arm in enumerate(arms):
            each = sums_of([cell["after"][name] for cell in arm.cells]).each
            axis.plot(each, [y] * len(each), "|", color="0.3", markersize=8)
    for axis, name in zip(axes[1] if rows == 2 else [], names, strict=False):
        assert reference is not None
        against = differences(reference, arms, name)
        _dots(axis, list(against), [one for one, _ in against.values()], f"{KINDS[name].title} minus {default}'s")
        axis.axvline(0, color="0.6", linewidth=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _dots(axis: plt.Axes, labels: Sequence[str], estimates: Sequence[paired.Estimate], what: str) -> None:
    values = [one.value for one in estimates]
    below, above = (
        [max(0.0, one.value - one.low) for one in estimates],
        [max(0.0, one.high - one.value) for one in estimates],
    )
    axis.errorbar(values, range(len(values)), xerr=[below, above], fmt="o", markersize=4, linewidth=1.2)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(what, fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
