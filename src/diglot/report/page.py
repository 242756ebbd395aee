"""A run, or two, as one HTML page that needs nothing else: no network, no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diglot.errors import ConfigError
from diglot.http.address import is_address
from diglot.report.advice import all_advice
from diglot.report.card import shown_name
from diglot.report.colours import (
    DISLIKES_DARK,
    DISLIKES_LIGHT,
    LIKES_DARK,
    LIKES_LIGHT,
    LIMIT,
    step_of,
)
from diglot.report.plots import CURVES, Curve, drawn, svg
from diglot.report.records import Record
from diglot.report.runs import Run, gap_of
from diglot.report.verdict import judge

MAX_CHUNKS = 800  # of one completion that are drawn
MAX_STEPS = 8  # of the training that are shown, evenly spaced, first and last among them
_VISIBLE = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}


def page(runs: Sequence[Run]) -> str:
    """The page of one run, or of two side by side. All text of models, data and options is escaped.

    Raises:
        ConfigError: a package that draws pages is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise ConfigError(
            "Reports are written with jinja2, which is not installed: pip install 'diglot[report]'."
        ) from error
    environment = Environment(
        loader=PackageLoader("diglot.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=_number, gap=_gap, visible=visible, percent=_percent)
    environment.tests["table"] = _is_table
    curves = [
        {"curve": curve, "runs": shown, "svg": Markup(svg(curve, shown, f"plot{i}", list(runs).index(shown[0])))}
        for i, (curve, shown) in enumerate(_pictures(runs))
    ]
    return environment.get_template("report.html.j2").render(
        runs=runs,
        title=" and ".join(run.name for run in runs),
        changes=[_changes(curve, runs) for curve in CURVES if curve.fixed and drawn(curve, runs)],
        advice=[(run, one) for run in runs for one in all_advice(run.logs)],
        verdicts=[(run, judge(run)) for run in runs],
        models=[models(run) for run in runs],
        curves=curves,
        columns=_columns(len(curves)),
        groups=side_by_side(runs),
        training=[(run, training_groups(run)) for run in runs],
        options=[without_folders({k: v for k, v in run.config.items() if v is not None}) for run in runs],
        differing=without_folders(_differing(runs)),
        css_colours=Markup(_css_colours()),
        limit=LIMIT,
    )


def models(run: Run) -> str:
    """Student and teachers by name, without a folder or an address; empty where the configuration has none."""
    student, teachers = (run.config.get(f"{side}model_name_or_path") for side in ("", "teacher_"))
    names = [_teacher(one, run) for one in (teachers if isinstance(teachers, list) else [teachers])]
    return f"{shown_name(str(student))} ← {', '.join(names)}" if student else ""


def without_folders(value: Any) -> Any:
    """A value of options with the last part of each absolute path: the page is shown to others."""
    if isinstance(value, dict):
        return {name: without_folders(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(one) for one in value]
    return shown_name(value) if isinstance(value, str) and Path(value).is_absolute() else value


def _teacher(entry: Any, run: Run) -> str:
    """The name of one teacher of a configuration; of one on a server that of its tokenizer."""
    own = entry if isinstance(entry, dict) else {"name": entry}
    name = own.get("name")
    if is_address(name):
        name = own.get("tokenizer") or run.config.get("teacher_tokenizer_name_or_path") or "a teacher on a server"
    return shown_name(str(name))


# ---- curves ----------------------------------------------------------------------------------------------------------


def _pictures(runs: Sequence[Run]) -> list[tuple[Curve, Sequence[Run]]]:
    """What is drawn with what: losses of different objectives have an axis each."""
    defining = ("trainer", "objective", "beta")
    same = all([run.config.get(n) for n in defining] == [runs[0].config.get(n) for n in defining] for run in runs)
    pictures: list[tuple[Curve, Sequence[Run]]] = []
    for curve in CURVES:
        groups = [runs] if same or not curve.of_objective else [[run] for run in runs]
        pictures += [(curve, group) for group in groups if drawn(curve, group)]
    return pictures


def _columns(number: int) -> int:
    """Pictures side by side, such that none is alone in the last line where that can be."""
    return next((columns for columns in (3, 4, 2) if number % columns != 1), 3)


# ---- numbers ---------------------------------------------------------------------------------------------------------


def _changes(curve: Curve, runs: Sequence[Run]) -> dict[str, Any]:
    """One row of the table of what changed."""
    values = []
    for run in runs:
        before, after = run.before_after(curve.fixed)
        values.append((before, after, after - before if before is not None and after is not None else None))
    return {"curve": curve, "values": values, "digits": _digits([v for row in values for v in row[:2]])}


def _digits(values: Sequence[float | None]) -> int:
    """Decimals of a row of numbers: three significant digits of the largest, at most four decimals."""
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    return 3 if not 0 < largest < math.inf else min(4, max(0, 2 - math.floor(math.log10(largest))))


def _differing(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """Options that two runs do not share, with the value of each."""
    names = sorted({name for run in runs for name in run.config})
    options = [(name, [run.config.get(name) for run in runs]) for name in names]
    return [(name, values) for name, values in options if any(value != values[0] for value in values)]


def _number(value: float | None, digits: int) -> str:
    return "\N{EN DASH}" if value is None else f"{value:,.{digits}f}"


def _gap(value: float, digits: int = 2) -> str:
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _percent(value: float) -> str:
    return f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def _is_table(value: Any) -> bool:
    """Rows with the same keys?"""
    rows = isinstance(value, list) and value and all(isinstance(one, dict) for one in value)
    return bool(rows) and all(one.keys() == value[0].keys() for one in value)


# ---- completions -----------------------------------------------------------------------------------------------------


def visible(text: str) -> str:
    """Text with spaces and line breaks that can be seen, and control characters as escapes."""
    return "".join(_VISIBLE.get(c, c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)


def side_by_side(runs: Sequence[Run]) -> list[list[dict[str, Any]]]:
    """Groups of completions to one prompt: before and after of one run, or the last ones of two."""
    if len(runs) == 1:
        ends = [("before the first step", runs[0].rollouts_in("before"))]
        ends.append((f"after step {runs[0].steps}", runs[0].rollouts_in("after")))
    else:
        ends = [(run.name, run.rollouts_in("after")) for run in runs]
    prompts = list(dict.fromkeys(record["prompt"] for _, records in ends for record in records))
    return [[_shown(title, r) for title, records in ends for r in records if r["prompt"] == p] for p in prompts]


def training_groups(run: Run) -> list[tuple[int, list[dict[str, Any]]]]:
    """Step -> completions while training, for at most `MAX_STEPS` steps."""
    records = run.rollouts_in("training")
    steps = sorted({record["step"] for record in records})
    if len(steps) > MAX_STEPS:
        steps = [steps[round(i * (len(steps) - 1) / (MAX_STEPS - 1))] for i in range(MAX_STEPS)]
    return [(step, [_shown(f"step {step}", r) for r in records if r["step"] == step]) for step in steps]


def _shown(title: str, record: Record) -> dict[str, Any]:
    """What the template needs of one rollout."""
    chunks = [_chunk(chunk) for chunk in record["chunks"][:MAX_CHUNKS]]
    gaps = [chunk["gap"] for chunk in chunks if chunk["gap"] is not None]
    size = record.get("num_bytes") or 0
    return {
        **record,
        "title": title,
        "chunks": chunks,
        "hidden": len(record["chunks"]) - len(chunks),
        "gap": sum(gaps) / size if gaps and size and len(chunks) == len(record["chunks"]) else None,
    }


def _chunk(chunk: dict[str, Any]) -> dict[str, Any]:
    gap = gap_of(chunk)
    step = step_of(gap)
    name = "" if step == 0 else f"g{step}" if step > 0 else f"m{-step}"
    return {**chunk, "gap": gap, "css": "unknown" if gap is None else name}


def _css_colours() -> str:
    """The colour scale as rules, for light and dark."""
    light = _rules(LIKES_LIGHT, DISLIKES_LIGHT)
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{_rules(LIKES_DARK, DISLIKES_DARK)}\n}}"


def _rules(likes: Sequence[str], dislikes: Sequence[str]) -> str:
    rules = [f".g{i} {{ background: {colour} }}" for i, colour in enumerate(likes, start=1)]
    return "\n".join(rules + [f".m{i} {{ background: {colour} }}" for i, colour in enumerate(dislikes, start=1)])
