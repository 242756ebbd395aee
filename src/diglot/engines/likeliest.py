"""A part of a distribution over the student's ids, and how much it leaves open."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diglot.arrays import Floats, Ints


@dataclass(frozen=True)
class Likeliest:
    """The teacher's distribution over the student's next token, as far as its rows say it. `R` rows.

    Of the mass `unknown` the rows do not say which token begins it, one that is named or another: a named id has its
    own mass or up to so much more.
    """

    ids: Ints  # [R, K], best first, -1 where there are fewer
    logps: Floats  # [R, K] nats, -inf there
    residual: Floats  # [R] in [0, 1], the mass of everything that is not named
    unknown: Floats  # [R] in [0, residual], a part of it


def likeliest_of(row: Ints, name: Ints, mass: Floats, rows: int, most: int) -> tuple[Ints, Floats, Floats]:
    """The `most` ids of each row with the most mass, summed over equal ones, as `Likeliest` holds them.

    Args:
        row, name, mass: `[n]` each, in any order; masses of one id and row may be negative, their sum is not.
    """
    width = int(name.max(initial=0)) + 1
    key, place = np.unique(row * width + name, return_inverse=True)
    total = np.bincount(place, mass, minlength=len(key))
    row, name = key // width, key % width
    order = np.lexsort((-total, row))
    row, name, total = row[order], name[order], total[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    best = (rank < most) & (total > 0)
    ids, masses = np.full((rows, most), -1, dtype=np.int64), np.zeros((rows, most))
    ids[row[best], rank[best]], masses[row[best], rank[best]] = name[best], total[best]
    over = np.maximum(masses.sum(-1, keepdims=True), 1.0)  # rounding
    with np.errstate(divide="ignore"):
        return ids, np.log(masses / over), np.clip(1.0 - (masses / over).sum(-1), 0.0, 1.0)
