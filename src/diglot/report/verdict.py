"""Did a run work? What its fixed prompts say, in words: the answer, where the rest of the distance is, what to do."""

from __future__ import annotations

import math
from dataclasses import dataclass

from diglot.report.runs import Run, gap_of

Z = 1.96  # standard errors of a 95% interval
_WORST = 3  # places that are named
_SHOWN = 0.05  # nats that they cost at least: less is shown as 0.0


@dataclass(frozen=True)
class Verdict:
    """`answer` is the first line of a report; `where` and `following` may be empty."""

    answer: str
    where: str
    following: str


def verdict(before: float, after: float, noise: float) -> str:
    """In words: is the student closer to the teacher than it was? Lower is closer.

    Args:
        before: distance to the teacher, in any unit.
        after: the same after training.
        noise: standard error of their difference.
    """
    if abs(after - before) <= 2 * noise:
        return "no clear change: the difference is within its noise. Train longer, or evaluate on more rows."
    if after > before:
        return "worse: the student is further from the teacher than before. Lower learning_rate."
    return f"better: {1 - after / before:.0%} of the distance to the teacher is gone." if before > 0 else "better."


def judge(run: Run) -> Verdict:
    """What the divergence on the fixed prompts says of a run, with a 95% interval of its change."""
    before, after = run.before_after("fixed/kl_nats_per_byte")
    if before is None or after is None:
        return Verdict(
            "Whether it worked cannot be said: the fixed prompts were not answered before the first step and after "
            "the last one.",
            _worst(run),
            "Measure it against the student before training with diglot eval.",
        )
    errors = run.before_after("fixed/kl_error")
    noise = None if None in errors else math.hypot(*(error or 0.0 for error in errors))
    change = after - before
    within = "" if noise is None else f" (95% interval {change - Z * noise:+.3f} to {change + Z * noise:+.3f})"
    numbers = f"The distance to the teacher went from {before:.3f} to {after:.3f} nats per byte, {change:+.3f}{within}."
    if noise is None:
        answer, following = "Not certain: the noise was not measured", "Measure it on more rows with diglot eval."
    elif abs(change) <= 2 * noise:
        answer, following = "No clear change", "Train longer, or measure on more rows with diglot eval."
    elif change > 0:
        answer, following = "No, it got worse", "Lower learning_rate, and look at the warnings below."
    else:
        answer, following = "Yes, it worked", "Confirm it on held-out rows with diglot eval."
    return Verdict(f"{answer}. {numbers}", _worst(run), following)


def _worst(run: Run) -> str:
    """The places of the last answers that the teacher finds least probable beside the student."""
    gaps = [
        (gap, chunk["text"].strip() or chunk["text"])
        for record in run.rollouts_in("after")
        for chunk in record["chunks"]
        if (gap := gap_of(chunk)) is not None
    ]
    lowest = {text: gap for gap, text in sorted(gaps, reverse=True) if gap < -_SHOWN}  # of one text its lowest stays
    worst = sorted((gap, text) for text, gap in lowest.items())[:_WORST]
    if not worst:
        return ""
    places = ", ".join(f"“{text[:24]}” ({gap:+.1f} nats)" for gap, text in worst)
    return f"In the last answers the teacher likes these least: {places}."
