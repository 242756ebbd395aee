"""How much more or less the teacher likes a chunk than the student, as one of eleven steps of a colour scale.

Blue and orange are told apart with every common kind of colour blindness; the middle is no colour.
"""

from __future__ import annotations

import math

LIMIT = 4.0  # nats at which the scale ends: one side gives the chunk 55 times the probability
STEPS = 5  # on either side of zero

# Backgrounds for steps 1 to 5, for dark text on white and for light text on near-black.
LIKES_LIGHT = ("#e3eefb", "#c3dcf5", "#9cc6ee", "#6fabe3", "#3f8fd6")
LIKES_DARK = ("#15283c", "#17375a", "#184879", "#1a5a9a", "#1b66ae")
DISLIKES_LIGHT = ("#fdeede", "#fbd9b5", "#f8bf85", "#f2a04f", "#e67f1e")
DISLIKES_DARK = ("#352413", "#503214", "#6f4314", "#8f5412", "#9c590a")


def step_of(gap: float | None) -> int:
    """The step in [-5, 5] of `gap`, log p_teacher - log p_student in nats; 0 for None and below a tenth of the scale.

    The scale is linear up to `LIMIT` on either side; what is beyond has the last colour.
    """
    if gap is None or not math.isfinite(gap):
        return 0
    share = min(abs(gap) / LIMIT, 1.0)
    return int(math.copysign(math.floor(share * STEPS + 0.5), gap))


def background(gap: float | None) -> str | None:
    """The background colour in a terminal, None for no colour."""
    step = step_of(gap)
    if step == 0:
        return None
    return (LIKES_DARK if step > 0 else DISLIKES_DARK)[abs(step) - 1]
