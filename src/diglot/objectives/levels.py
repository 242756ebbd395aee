"""What a teacher can say, from least to most."""

from __future__ import annotations

from enum import IntEnum


class Level(IntEnum):
    """How much of its distributions a teacher gives. Each level includes those below, so levels can be compared."""

    TEXT_LOGPROBS = 1
    """The log-probability of each token of a given text."""
    CHOSEN = 2
    """Also those of ids that the caller chooses, at each position."""
    TOP_K = 3
    """Also the most likely ids of each position with their log-probabilities."""
    HIDDEN = 4
    """Hidden states and the output head: whole distributions, formed where they are needed."""
    LOGITS = 5
    """Whole rows of logits."""
