"""A part of a distribution over the student's ids, and how much it leaves open."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Likeliest:
    """The teacher's distribution over the student's next token, as far as its rows say it. `R` rows.

    Each named id has its own mass, and `residual` is that of all others together: no id is among the others with more.
    """

    ids: NDArray[np.int64]  # [R, K], best first, -1 where there are fewer
    logps: NDArray[np.float64]  # [R, K] nats, -inf there
    residual: NDArray[np.float64]  # [R] in [0, 1], the mass of everything that is not named
    unknown: NDArray[np.float64]  # [R] in [0, residual], the part of it of which the rows do not say what begins it
