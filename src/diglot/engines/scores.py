"""What a teacher says about the ids that it reads: log-probs of the text, and the likeliest ids of each row.

`T` tokens of a text, `K` likeliest ids of a row, `H` hidden size. Entry `t` is about token `t` given those before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diglot.arrays import Floats, Ints
from diglot.errors import TeacherError

_ROWS = 256  # of logits that exist at a time


@dataclass(frozen=True)
class TeacherScores:
    """Log-probabilities in nats. The first token of a text has no score: its entry is never read."""

    logps: Floats  # [T]
    top_ids: Ints | None = None  # [T, K], -1 where there are fewer
    top_logps: Floats | None = None  # [T, K], -inf there

    @classmethod
    def of(cls, logps: Any, top_ids: Any = None, top_logps: Any = None) -> TeacherScores:
        """The same from lists, arrays or tensors of any device and float type.

        Raises `TeacherError` for shapes that do not fit each other.
        """
        made = cls(
            as_array(logps, np.float64),
            None if top_ids is None else as_array(top_ids, np.int64),
            None if top_logps is None else as_array(top_logps, np.float64),
        )
        if made.logps.ndim != 1:
            raise TeacherError(f"The teacher's log-probs have shape {made.logps.shape}, expected [T] of one text.")
        shapes = [None if a is None else a.shape for a in (made.top_ids, made.top_logps)]
        fits = shapes[0] is None or (len(shapes[0]) == 2 and shapes[0][0] == len(made.logps))
        if shapes[0] != shapes[1] or not fits:
            raise TeacherError(
                f"The likeliest ids have shape {shapes[0]} and their log-probs {shapes[1]}, expected the same "
                f"[{len(made.logps)}, K] of both, as the text has {len(made.logps)} log-probs."
            )
        return made

    def checked(self, ids: Ints) -> TeacherScores:
        """Itself, if it has one finite-or-minus-infinite log-prob of at most 0 for each of `ids` but the first.

        Raises `TeacherError` that names the place and the two values.
        """
        if len(self.logps) != len(ids):
            raise TeacherError(
                f"The teacher reads {len(ids)} tokens and there are {len(self.logps)} log-probs. Give one each, "
                "with any number for the first: entry t is the log-prob of token t given those before it."
            )
        wrong = np.flatnonzero(~(self.logps[1:] <= 1e-2)) + 1  # above 0 by less is rounding; NaN compares false
        if len(wrong):
            at = int(wrong[0])
            raise TeacherError(
                f"The teacher's log-prob of token {at} (id {ids[at]}) is {self.logps[at]}, expected a number of at "
                "most 0. Look for NaN in its logits, and at the order of what was given."
            )
        return self


def score_hidden(hidden: Any, head: Callable[[Any], Any], ids: Ints, top: int = 0) -> TeacherScores:
    """Scores from hidden states: logits are formed a few rows at a time, in float32.

    Args:
        hidden: tensor `[T, H]`, the model's last hidden states of `ids`.
        head: hidden states `[R, H]` -> logits `[R, V]`, with all that the model does to them (soft caps, scales).
        ids: `[T]`, what the teacher read.
        top: how many likeliest ids of each row.
    """
    import torch

    count = len(ids)
    logps, top_ids, top_logps = np.full(count, np.nan), np.full((count, top), -1), np.full((count, top), -np.inf)
    written = torch.from_numpy(np.asarray(ids, dtype=np.int64))
    with torch.no_grad():
        for low in range(0, count - 1, _ROWS):
            high = min(low + _ROWS, count - 1)
            rows = head(hidden[low:high]).float().log_softmax(-1)
            own = rows.gather(-1, written[low + 1 : high + 1, None].to(rows.device))[:, 0]
            logps[low + 1 : high + 1] = own.cpu().numpy()
            if top:
                best = rows.topk(top, dim=-1)
                top_ids[low + 1 : high + 1], top_logps[low + 1 : high + 1] = best.indices.cpu(), best.values.cpu()
    return TeacherScores(logps, top_ids, top_logps) if top else TeacherScores(logps)


def as_array(values: Any, dtype: type) -> NDArray[Any]:
    """A numpy array of a list, an array or a tensor."""
    if hasattr(values, "detach"):
        values = values.detach().to("cpu")
        values = values.double() if dtype is np.float64 else values.long()
    return np.asarray(values, dtype=dtype)
