"""Which numbers of a log are shown while a run goes on, and how they are called there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What the progress bar shows, in this order: name of the metric, name on the screen, format.
SHOWN = (
    ("loss", "loss", "{:.4g}"),
    ("rollouts/kl_nats_per_byte", "nats/byte", "{:.3f}"),
    ("eval_reverse_kl_nats_per_byte", "eval nats/byte", "{:.3f}"),
    ("eval_bits_per_byte", "eval bits/byte", "{:.3f}"),
    ("align/coverage", "coverage", "{:.1%}"),
    ("completions/mean_length", "length", "{:.0f}"),
    ("completions/clipped_ratio", "cut", "{:.0%}"),
    ("rollouts/stop_agreement", "stop", "{:.2f}"),
    ("grad_norm", "grad", "{:.3g}"),
    ("learning_rate", "lr", "{:.2g}"),
)


def numbers_that_matter(logs: Mapping[str, Any]) -> dict[str, str]:
    """Name on the screen -> value, of those in `logs`."""
    return {shown: form.format(float(logs[name])) for name, shown, form in SHOWN if name in logs}


def as_text(step: int, numbers: Mapping[str, str], width: int | None = None) -> str:
    """The numbers of a log behind its step; broken between two of them where a terminal has `width` columns."""
    parts = [f"{name} {value}" for name, value in numbers.items()]
    text = f"step {step}: {', '.join(parts)}"
    if width is None or len(text) <= width:
        return text
    lines = [f"step {step}:"]
    for k, part in enumerate(parts):
        more = part if k == len(parts) - 1 else f"{part},"
        if len(lines[-1]) + 1 + len(more) > width:
            lines.append(" ")
        lines[-1] += f" {more}"
    return "\n".join(lines)
