"""The table of a tier, in Markdown, made from cells alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from arms import markdown

from . import paired
from .declaration import Declaration
from .measures import KINDS
from .runner import ArmResult, Cell, PairResult, sums_of

PLAIN = ("length", "stopped")  # shown as means, without an interval


def show(declaration: Declaration, results: Sequence[PairResult]) -> str:
    """A section for each pair, in the order of the declaration."""
    by_name = {result.pair.name: result for result in results}
    return "\n\n".join(_pair(declaration, result, by_name) for result in results)


def _pair(declaration: Declaration, result: PairResult, others: dict[str, PairResult]) -> str:
    head = f"### {result.pair.name}\n"
    if result.headroom is None or result.refused:
        return f"{head}\n{result.refused}."
    before, teacher = result.headroom["before"], result.headroom["teacher"]
    names = [name for name in KINDS if name in before]
    compared = [name for name in names if KINDS[name].better]
    reference = next((arm for arm in result.arms if arm.arm == declaration.default and arm.cells), None)
    columns = ["arm", "rate", *(title(name, before[name]) for name in names), "one-to-one", "s", "CPU s", "MiB"]
    start = ["before", "-", *(f"{before[name]['value']:.3f}" for name in names), "-", "-", "-", "-"]
    of_teacher = [f"{teacher[name]['value']:.3f}" if name in teacher else "-" for name in names]
    rows = [start, ["teacher", "-", *of_teacher, "-", "-", "-", "-"]]
    rows += [_row(arm, names) for arm in result.arms]
    parts = [head, _facts(result), "", markdown(columns, rows)]
    if reference is not None and len(result.arms) > 1:
        parts += ["", _differences(declaration.default, reference, result.arms, compared, before)]
    if (line := _gain(declaration.default, result, others)) is not None:
        parts += ["", line]
    return "\n".join(parts)


def _facts(result: PairResult) -> str:
    budget, cells = result.pair.budget, [cell for arm in result.arms for cell in arm.cells]
    seeds = len(result.arms[0].cells) if result.arms and result.arms[0].cells else 0
    seconds = sum(cell["cpu_seconds"] for cell in cells)
    return (
        f"{budget.steps} steps of {budget.batch} prompts, {budget.items} held-out items, {seeds} seeds; rates "
        f"{', '.join(f'{rate:g}' for rate in result.pair.rates)}; {seconds:.0f} CPU seconds of training are shown."
    )


def title(name: str, measure: Cell) -> str:
    """What a measure is called, with its unit unless its name says it."""
    words, unit = KINDS[name].title, measure["unit"]
    return words if unit == "share" or unit in words else f"{words}, {unit}"


def _row(arm: ArmResult, names: Sequence[str]) -> list[str]:
    if not arm.cells:
        return [f"`{arm.arm}`", "-", (arm.error or "not run").partition(":")[0], *["-"] * (len(names) + 3)]
    values = [_value(arm, name) for name in names]
    shares = [cell["one_to_one"] for cell in arm.cells if cell["one_to_one"] is not None]
    share = f"{fmean(shares):.2f}" if shares else "-"
    costs = [fmean(cell[key] for cell in arm.cells) for key in ("seconds", "cpu_seconds", "peak_mib")]
    return [f"`{arm.arm}`", f"{arm.rate:g}", *values, share, *(f"{cost:.0f}" for cost in costs)]


def _value(arm: ArmResult, name: str) -> str:
    sums = sums_of([cell["after"][name] for cell in arm.cells])
    if name in PLAIN:
        return f"{sums.value:.2f}"
    got = paired.interval(sums)
    return f"{got.value:.3f} ({got.low:.3f} to {got.high:.3f})"


def differences(reference: ArmResult, arms: Sequence[ArmResult], name: str) -> dict[str, tuple[paired.Estimate, float]]:
    """Of each other arm with results, `arm - reference`, and its p corrected for the number of arms."""
    base = sums_of([cell["after"][name] for cell in reference.cells])
    got = {
        arm.arm: paired.difference(sums_of([cell["after"][name] for cell in arm.cells]), base)
        for arm in arms
        if arm.cells and arm.arm != reference.arm
    }
    adjusted = paired.holm({arm: one.p for arm, one in got.items()})
    return {arm: (one, adjusted[arm]) for arm, one in got.items()}


def verdict(one: paired.Estimate, p: float, better: str | None) -> str:
    """What a difference says of the arm, at 5 % after correction; one seed alone says nothing about seeds."""
    if one.seeds < 2 or not math.isfinite(p) or p > 0.05:
        return "-"
    good = (one.value < 0) == (better == "lower")
    return "better" if good else "worse"


def _differences(
    default: str, reference: ArmResult, arms: Sequence[ArmResult], names: Sequence[str], before: dict[str, Any]
) -> str:
    columns = [f"minus `{default}`", *(title(name, before[name]) for name in names)]
    rows: dict[str, list[str]] = {}
    for name in names:
        for arm, (one, p) in differences(reference, arms, name).items():
            text = f"{one.value:+.3f} ({one.low:+.3f} to {one.high:+.3f}), p {_p(p)}, {one.agreeing}/{one.seeds}"
            word = verdict(one, p, KINDS[name].better)
            rows.setdefault(arm, []).append(text if word == "-" else f"{text}, {word}")
    return markdown(columns, [[f"`{arm}`", *cells] for arm, cells in rows.items()])


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _gain(default: str, result: PairResult, others: dict[str, PairResult]) -> str | None:
    """How far the default goes to its teacher, beside the control, whose start need not be as far away."""
    control = others.get(result.pair.control or "")
    own = next((arm for arm in result.arms if arm.arm == default and arm.cells), None)
    theirs = next((arm for arm in control.arms if arm.cells), None) if control else None
    if own is None or control is None or theirs is None or result.headroom is None or control.headroom is None:
        return None
    mine, other = _way(result.headroom, own), _way(control.headroom, theirs)
    share = f"; {mine[0] / other[0]:.0%} of that of the control" if other[0] > 0 else "; the control gained nothing"
    return (
        f"Of its distance to the teacher in reverse KL, `{default}` goes {mine[0]:.0%} ({mine[1]:.3f} to {mine[2]:.3f})"
        f"{share} (`{theirs.arm}` on {control.pair.name}: {other[0]:.0%}, {other[1]:.3f} to {other[2]:.3f})."
    )


def _way(headroom: Cell, arm: ArmResult) -> tuple[float, float, float]:
    """The share of the distance that is gone, the distance before, and after."""
    before = float(headroom["before"]["reverse_kl"]["value"])
    after = sums_of([cell["after"]["reverse_kl"] for cell in arm.cells]).value
    return 1 - after / before, before, after
