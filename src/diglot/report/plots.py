"""Curves of one run or two as SVG whose colours are the page's, so that one picture serves light and dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diglot.errors import ConfigError
from diglot.report.runs import Run

# Colours that stand for the page's own; no other part of a picture has them.
_CSS = {"#0a0b01": "ink-soft", "#0a0b02": "line", "#0a0b03": "run-0", "#0a0b04": "run-1", "#0a0b05": "paper"}
_INK, _LINE, _RUN_0, _RUN_1, _PAPER = _CSS


@dataclass(frozen=True)
class Curve:
    """One picture: what is drawn for each run. `better` is what a reader hopes for."""

    title: str
    unit: str
    training: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()
    fixed: str = ""
    better: str = ""
    log_scale: bool = False
    bounds: tuple[float, float] = (-math.inf, math.inf)  # values that are possible; the axis does not leave them
    of_objective: bool = False  # its unit is the objective's own: runs of two objectives do not share an axis


_SHARE, _SIZE = (0.0, 1.0), (0.0, math.inf)

CURVES = (
    Curve(
        "Divergence student → teacher",
        "nats per byte",
        ("rollouts/kl_nats_per_byte",),
        ("*reverse_kl_nats_per_byte",),
        "fixed/kl_nats_per_byte",
        "lower",
        bounds=_SIZE,
    ),
    Curve("Log-ratio student / teacher", "nats per byte", ("rollouts/log_ratio_nats_per_byte",)),
    Curve("Reference text", "bits per byte", (), ("*bits_per_byte",), "fixed/bits_per_byte", "lower", bounds=_SIZE),
    Curve("Length of completions", "bytes", ("completions/mean_bytes",), (), "fixed/mean_bytes", bounds=_SIZE),
    Curve(
        "Stop agreement",
        "share",
        ("rollouts/stop_agreement",),
        ("*stop_agreement",),
        "fixed/stop_agreement",
        "higher",
        bounds=_SHARE,
    ),
    Curve(
        "Alignment coverage",
        "share of tokens",
        ("align/coverage",),
        ("*coverage",),
        "fixed/coverage",
        "higher",
        bounds=_SHARE,
    ),
    Curve("Repetition", "share of text", ("completions/repetition",), (), "", "lower", bounds=_SHARE),
    Curve("Loss", "nats per item", ("loss",), (), "", "lower", of_objective=True),
    Curve("Gradient norm", "", ("grad_norm",), log_scale=True, bounds=_SIZE, of_objective=True),
)


def drawn(curve: Curve, runs: Sequence[Run]) -> bool:
    """Is there anything to draw?"""
    return any(
        run.series(*curve.training)[0]
        or run.series(*curve.evaluation)[0]
        or any(value is not None for value in run.before_after(curve.fixed))
        for run in runs
    )


def svg(curve: Curve, runs: Sequence[Run], name: str, first: int = 0) -> str:
    """The picture of `curve` as an `<svg>` element; `name` makes its ids unique in the page.

    `first` is the place of the first of `runs` among all runs of the page: its colour.

    Thin lines are logs of training, dots evaluations, diamonds the fixed prompts before and after.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ConfigError(
            "Reports are drawn with matplotlib, which is not installed: pip install 'diglot[report]'."
        ) from error
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9.5, "axes.formatter.useoffset": False}
    with rc_context(style):
        figure = Figure(figsize=(4.6, 2.3), layout=ConstrainedLayoutEngine(w_pad=0.14))  # a reader's font may be wider
        axes: Any = figure.add_subplot()
        for number, run in enumerate(runs[:2], start=first):
            _draw(axes, curve, run, (_RUN_0, _RUN_1)[number], number)
        _dress(axes, curve)
        last = max(1, *(run.steps for run in runs))
        axes.set_xlim(-0.03 * last, 1.03 * last)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(file.getvalue(), name, f"{curve.title} over steps{f', {curve.unit}' if curve.unit else ''}")


def _draw(axes: Any, curve: Curve, run: Run, colour: str, number: int) -> None:
    solid = ("-", (0, (5, 1.5)))[number]  # the second run can be told without colour
    steps, values = run.series(*curve.training)
    axes.plot(steps, values, color=colour, lw=1.4, ls=solid, alpha=0.75, marker="." if len(steps) == 1 else None)
    steps, values = run.series(*curve.evaluation)
    axes.plot(steps, values, color=colour, lw=1.2, ls=solid, marker="o", ms=4.5)
    ends = [(step, v) for step, v in zip((0, run.steps), run.before_after(curve.fixed), strict=True) if v is not None]
    if ends:
        x, y = zip(*ends, strict=True)
        axes.plot(x, y, color=colour, ls=":", lw=1, marker="D", ms=7, mfc=_PAPER, mew=1.6, zorder=4, clip_on=False)


def _dress(axes: Any, curve: Curve) -> None:
    from matplotlib.ticker import MaxNLocator

    if curve.log_scale and _spans_decades(axes):
        axes.set_yscale("log")
    axes.set_xlabel("step", color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.grid(axis="y", color=_LINE, lw=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.03, y=0.12)
    _stay_possible(axes, curve.bounds)
    axes.tick_params(colors=_INK, which="both", length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_LINE)


def _stay_possible(axes: Any, bounds: tuple[float, float]) -> None:
    """No axis goes on beyond values that exist, unless one that was logged lies there."""
    values = [y for line in axes.get_lines() for y in line.get_ydata() if math.isfinite(y)]
    if not values or axes.get_yscale() == "log":
        return
    low, high = axes.get_ylim()
    low = max(low, bounds[0]) if min(values) >= bounds[0] else low
    high = min(high, bounds[1]) if max(values) <= bounds[1] else high
    if low < high:
        axes.set_ylim(low, high)


def _spans_decades(axes: Any) -> bool:
    """Are all values positive, and the largest fifty times the smallest?"""
    values = [y for line in axes.get_lines() for y in line.get_ydata()]
    return bool(values) and min(values) > 0 and max(values) > 50 * min(values)


def _for_page(text: str, name: str, label: str) -> str:
    """Only the element; ids of its own, the page's colours and font, and a name for who cannot see it."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(url\(|xlink:href=")#', rf"\1#{name}-", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font: \1 var(--font)", text)
    for placeholder, variable in _CSS.items():
        text = text.replace(placeholder, f"var(--{variable})")
    head = f'<svg role="img" aria-label="{label}" '
    return re.sub(r'<svg (?:width|height)="[^"]*"', "<svg", text.replace("<svg ", head, 1), count=1)
