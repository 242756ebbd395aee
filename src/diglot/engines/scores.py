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
from diglot.engines.transcript import to_numpy
from diglot.errors import DataError, TeacherError

_ROWS = 256  # of logits that exist at a time
ROUNDING = 1e-2  # nats: above 0 by less is rounding
_DISAGREE = 5e-2  # between two roundings of one number, of 16 bits; another row's number is further off


@dataclass(frozen=True)
class TeacherScores:
    """Log-probabilities in nats. The first token of a text has no score: its entry is never read."""

    logps: Floats  # [T]
    top_ids: Ints | None = None  # [T, K], -1 where there are fewer
    top_logps: Floats | None = None  # [T, K], -inf there

    @classmethod
    def of(cls, logps: Any, top_ids: Any = None, top_logps: Any = None) -> TeacherScores:
        """The same from lists, arrays or tensors of any device and float type.

        Raises `TeacherError` for what holds no numbers, and for shapes that do not fit each other.
        """
        try:
            made = cls(
                as_array(logps, np.float64),
                None if top_ids is None else as_array(top_ids, np.int64),
                None if top_logps is None else as_array(top_logps, np.float64),
            )
        except DataError as error:
            raise TeacherError(f"The teacher's scores cannot be read: {error}") from None
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
        """The same as arrays, if there is one finite-or-minus-infinite log-prob of at most 0 for each of `ids` but the
        first, and the likeliest ids of a row are distinct, agree with it and have no more mass than there is.

        Raises `TeacherError` that names the place and the two values.
        """
        made = TeacherScores.of(self.logps, self.top_ids, self.top_logps)
        if len(made.logps) != len(ids):
            raise TeacherError(
                f"The teacher reads {len(ids)} tokens and there are {len(made.logps)} log-probs. Give one each, "
                "with any number for the first: entry t is the log-prob of token t given those before it."
            )
        wrong = np.flatnonzero(~(made.logps[1:] <= ROUNDING)) + 1  # NaN compares false
        if len(wrong):
            at = int(wrong[0])
            raise TeacherError(
                f"The teacher's log-prob of token {at} (id {ids[at]}) is {made.logps[at]}, expected a number of at "
                "most 0. Look for NaN in its logits, and at the order of what was given."
            )
        if made.top_ids is not None and made.top_logps is not None:
            _check_likeliest(made.logps, made.top_ids, made.top_logps, ids)
        return made


def _check_likeliest(logps: Floats, top_ids: Ints, top_logps: Floats, ids: Ints) -> None:
    """`TeacherError` for rows that are no part of one distribution, or of another token than the log-probs."""

    def refuse(wrong: NDArray[Any], what: Callable[[int], str]) -> None:
        if wrong[1:].any():  # the first is not read
            at = int(np.flatnonzero(wrong[1:])[0]) + 1
            raise TeacherError(
                f"The teacher's likeliest ids of row {at}, in the place of token {at} (id {ids[at]}), {what(at)}"
            )

    bad = ~(top_logps <= ROUNDING)
    refuse(
        np.logical_or.reduce(bad, axis=-1),
        lambda at: f"have a log-prob of {top_logps[at][bad[at]][0]}, expected numbers of at most 0.",
    )
    nameless = (top_ids < 0) & (top_logps > -np.inf)
    refuse(
        np.logical_or.reduce(nameless, axis=-1),
        lambda at: (
            f"hold id {top_ids[at][nameless[at]][0]} with a log-prob of {top_logps[at][nameless[at]][0]}, "
            "expected ids from 0; where there are fewer, -1 with -inf."
        ),
    )
    ordered = np.sort(top_ids, axis=-1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    refuse(twice.any(-1), lambda at: f"hold id {ordered[at, 1:][twice[at]][0]} twice, expected each once.")
    mass = np.exp(np.minimum(top_logps, 0.0)).sum(-1)
    refuse(mass > 1 + _DISAGREE, lambda at: f"have {mass[at]:.3f} of the mass together, expected at most 1.")
    own = np.where(top_ids == ids[:, None], top_logps, -np.inf).max(-1, initial=-np.inf)
    both = np.isfinite(own) & np.isfinite(logps)
    apart = np.abs(np.where(both, own, 0.0) - np.where(both, logps, 0.0))
    refuse(
        apart > _DISAGREE * (1 + np.abs(np.where(both, logps, 0.0))),
        lambda at: (
            f"give it {own[at]:.4f} and its own log-prob is {logps[at]:.4f}, expected the same. Row t is the "
            "distribution before token t: look whether the rows stand one place further."
        ),
    )


def score_hidden(hidden: Any, head: Callable[[Any], Any], ids: Ints, top: int = 0) -> TeacherScores:
    """Scores from hidden states: logits are formed a few rows at a time, in float32.

    Args:
        hidden: tensor `[T, H]`, the model's last hidden states of `ids`.
        head: hidden states `[R, H]` -> logits `[R, V]`, with all that the model does to them (soft caps, scales).
        ids: `[T]`, what the teacher read.
        top: how many likeliest ids of each row.

    Raises:
        TeacherError: hidden states of another text.
    """
    import torch

    count = len(ids)
    if hidden.ndim != 2 or len(hidden) != count:
        raise TeacherError(
            f"There are {count} ids and hidden states of shape {tuple(hidden.shape)}, expected [{count}, H]: those of "
            "the text alone, without a batch dimension or padding."
        )
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
    """A numpy array of a list, an array or a tensor. `DataError` for what holds no such numbers."""
    kind = "whole numbers" if dtype is np.int64 else "numbers"
    try:
        result = to_numpy(values, "They")
        # A mask, times and text would become numbers without a word. None is NaN.
        made: NDArray[Any] | None = None if result.dtype.kind in "bcmMSU" else result.astype(dtype, copy=False)
    except (TypeError, ValueError, OverflowError):
        made = None
    if made is None:
        held = f"{values!r:.60}" if isinstance(values, (list, tuple, str)) else type(values).__name__
        raise DataError(f"{held} is no list, array or tensor of {kind}.")
    if dtype is np.int64 and result.size and result.dtype.kind not in "iu":
        raise DataError(f"They are {result.dtype}, expected whole numbers.")
    return made
