"""How the log-prob of a chunk is given to the student's tokens in it.

The teacher's log-prob of a chunk is the one number that both tokenizations share. Engines want one for each token, and
no rule can know how the teacher would have cut the chunk: each has its bias, named here. Sums over chunks are the
teacher's under all of them but `pairs`, so sums over texts are, and with them every estimate that reads sums only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from diglot.arrays import Floats, Ints
from diglot.errors import ConfigError

Rule = Callable[[Floats, Ints, Ints, "Floats | None"], Floats]


def shared(sums: Floats, chunk: Ints, count: Ints, student: Floats | None) -> Floats:
    """Evenly over the chunk's tokens.

    Bias: pulls the tokens of a chunk together. A token that the teacher finds sure gets blame of its neighbours.
    """
    share: Floats = (sums / count)[chunk]
    return share


def gap(sums: Floats, chunk: Ints, count: Ints, student: Floats | None) -> Floats:
    """The student's own log-prob plus an even share of the chunk's difference.

    So every token of a chunk has the same log-ratio to the teacher, which is what a reverse-KL reward reads. Bias: none
    inside a chunk in favour of any token; the log-prob itself follows the student and may be above 0.
    """
    if student is None:
        raise ConfigError("Credit 'gap' shares the difference to the student: give the student's log-probs.")
    return student + ((sums - np.bincount(chunk, student, minlength=len(sums))) / count)[chunk]


def first(sums: Floats, chunk: Ints, count: Ints, student: Floats | None) -> Floats:
    """All to the token that opens the chunk; the others get 0, as if sure.

    Bias: right if the first token settles the rest, and blames it for all that comes after it otherwise.
    """
    return np.where(_edge(chunk, -1), sums[chunk], 0.0)


def last(sums: Floats, chunk: Ints, count: Ints, student: Floats | None) -> Floats:
    """All to the token that closes the chunk; the others get 0, as if sure.

    Bias: no token is charged for what was not yet written, and the one that closes it for what others wrote.
    """
    return np.where(_edge(chunk, 1), sums[chunk], 0.0)


def pairs(sums: Floats, chunk: Ints, count: Ints, student: Floats | None) -> Floats:
    """As `shared`, which in a chunk of one token on either side is that token's own log-prob; the others are not valid.

    Bias: none where it speaks. It is silent about all other text, which is not a random part of it.
    """
    return shared(sums, chunk, count, student)


RULES: dict[str, Rule] = {one.__name__: one for one in (shared, gap, first, last, pairs)}


def find_rule(name: str) -> Rule:
    """The rule of that name. `ConfigError` with all names if there is none."""
    if not isinstance(name, str) or name not in RULES:
        raise ConfigError(f"There is no credit rule {name!r}: choose one of {', '.join(RULES)}.")
    return RULES[name]


def _edge(chunk: Ints, side: int) -> Any:
    """Which tokens are the first (-1) or last (1) of their chunk. Chunks are consecutive."""
    changes = np.ones(len(chunk), dtype=bool)
    if side < 0:
        changes[1:] = chunk[1:] != chunk[:-1]
    else:
        changes[:-1] = chunk[1:] != chunk[:-1]
    return changes
