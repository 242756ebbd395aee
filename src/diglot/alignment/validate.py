"""Cheap checks of what is to be aligned: a few vector comparisons per side."""

from __future__ import annotations

import numpy as np

from diglot.alignment.types import Side
from diglot.errors import AlignmentError

_DTYPES = {"end": np.int64, "segment": np.int64, "exact": np.bool_, "stop": np.bool_}


def check_side(side: Side, num_segments: int, name: str) -> None:
    """Raise `AlignmentError` unless `side` keeps the rules of `Side`."""
    _check_arrays(side, name)
    end, segment, stop = side.end, side.segment, side.stop
    if not len(end):
        return
    same = segment[1:] == segment[:-1]
    _refuse(segment[1:] < segment[:-1], segment, "segment", name, "segments must be ascending")
    if segment[0] < 0 or segment[-1] >= num_segments:
        raise AlignmentError(
            f"{name}: segments run from {segment[0]} to {segment[-1]}, but there are {num_segments} (0 to "
            f"{num_segments - 1}). Pack only scored tokens and count segments over the whole batch."
        )
    if end.min() < 0:
        at = int(end.argmin())
        raise AlignmentError(
            f"{name}: segment {segment[at]}, token {at} ends at byte {end[at]}; the first byte is 0. Pass byte ends "
            "inside the segment."
        )
    _refuse(same & (end[1:] < end[:-1]), end, "end", name, "ends must not decrease within a segment", segment)
    _refuse(same & stop[:-1], stop, "stop", name, "a stop token must be the last of its segment", segment)
    _refuse(same & stop[1:] & (end[1:] == end[:-1]), end, "end", name, "a stop token ends at length + 1", segment)


def _check_arrays(side: Side, name: str) -> None:
    for field, dtype in _DTYPES.items():
        array = getattr(side, field)
        if array.dtype != dtype or array.shape != side.end.shape or array.ndim != 1:
            raise AlignmentError(
                f"{name}.{field} is {array.dtype} {array.shape}, expected {np.dtype(dtype)} of the one-dimensional "
                f"shape of {name}.end, {side.end.shape}. Convert it with astype."
            )


def _refuse(
    bad: np.ndarray, values: np.ndarray, field: str, name: str, rule: str, segment: np.ndarray | None = None
) -> None:
    """Raise for the first token `i` with `bad[i - 1]`, showing its value and the one before."""
    if bad.any():
        i = int(bad.argmax()) + 1
        where = (values if segment is None else segment)[i]
        raise AlignmentError(
            f"{name}: segment {where}, token {i} has {field} {values[i]} after {values[i - 1]}: {rule}."
        )
