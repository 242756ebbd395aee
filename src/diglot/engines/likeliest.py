"""A teacher's likeliest tokens as ids of the student."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diglot.rendering import Renderer


@dataclass(frozen=True)
class Likeliest:
    """A part of a distribution over the student's ids, and the mass of all that it does not name. `R` rows."""

    ids: NDArray[np.int64]  # [R, K], best first, -1 where there are fewer
    logps: NDArray[np.float64]  # [R, K] nats, -inf there
    residual: NDArray[np.float64]  # [R] in [0, 1], the mass of everything that is not named


class IdMap:
    """The student's id of each of the teacher's that spells the same bytes; all stop ids are the one stop event."""

    def __init__(self, student: Renderer, teacher: Renderer) -> None:
        own, theirs = student.vocabulary.shared(teacher.vocabulary)
        self.twin = np.full(len(teacher.vocabulary), -1, dtype=np.int64)
        self.twin[theirs] = own
        self.twin[list(teacher.stop_ids)] = student.stop_id

    def likeliest_on_student(self, top_ids: NDArray[np.int64], top_logps: NDArray[np.float64]) -> Likeliest:
        """The teacher's named ids `[R, K]` of rows that both sides predict from the same bytes, in the student's ids.

        A token keeps its mass if one of the student's has the very bytes; the mass of the others joins the residual.
        So no mass is given to a token that did not have it. This is the one place that says how the teacher's
        distribution is carried over.
        """
        known = (top_ids >= 0) & (top_ids < len(self.twin))
        ids = np.where(known, self.twin[np.where(known, top_ids, 0)], -1)
        logps = np.where(ids >= 0, top_logps, -np.inf)
        ids, logps = _merged(ids, logps)
        order = np.argsort(-logps, axis=-1, kind="stable")
        ids, logps = np.take_along_axis(ids, order, -1), np.take_along_axis(logps, order, -1)
        residual = np.clip(1.0 - np.exp(logps).sum(-1), 0.0, 1.0)
        return Likeliest(np.where(np.isfinite(logps), ids, -1), logps, residual)


def _merged(ids: NDArray[np.int64], logps: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Each id once in its row, with the mass of all entries that had it: several stop ids are one event."""
    ids, logps = ids.copy(), logps.copy()
    for k in range(1, ids.shape[1]):
        row, place = np.nonzero((ids[:, :k] == ids[:, k : k + 1]) & (ids[:, k : k + 1] >= 0))
        logps[row, place] = np.logaddexp(logps[row, place], logps[row, k])
        ids[row, k], logps[row, k] = -1, -np.inf
    return ids, logps
