"""What a teacher can say, from least to most."""

from __future__ import annotations

from enum import IntEnum


class Level(IntEnum):
    """How much of its distributions a teacher gives. Each level includes those below, so levels can be compared."""

    TEXT_LOGPROBS = 1
    """The log-probability of each token of a given text."""
    TOP_K = 2
    """Also the most likely ids of each position with their log-probabilities."""
    CHOSEN = 3
    """Also the log-probabilities of any ids that are named at each position, such as the student's likeliest."""
    HIDDEN = 4
    """Hidden states and the output head: whole distributions, formed where they are needed."""
