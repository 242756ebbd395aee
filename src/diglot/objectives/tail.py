"""Tokens that a teacher is asked about beside its reading of the whole text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class TailTokens:
    """The teacher's tokens for the last bytes of a prefix, where they are not those of the whole text, `[E]` each."""

    ids: Ints
    before: Ints  # the scored teacher token in whose place the branch goes another way
    depth: Ints  # 0 for the first token of a branch
    row: Ints  # the row that predicts it: a teacher token's, or `N_t +` the branch token before it
