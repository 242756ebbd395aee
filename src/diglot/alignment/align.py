"""Sorted-set intersection of two sides' byte boundaries, for a whole batch at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from diglot.alignment.types import Alignment, Side
from diglot.alignment.validate import check_side
from diglot.arrays import Bools, Ints
from diglot.errors import AlignmentError


def align(student: Side, teacher: Side, num_segments: int) -> Alignment[NDArray[Any]]:
    """Cut the segments of a batch at the byte offsets where tokens of both sides end.

    A token of zero bytes joins the chunk of the next token of its segment that has bytes, at the end of a segment the
    chunk of the last one that has. A chunk with an inexact token is kept, with `chunk_exact` False, and is never a
    pair. Time is that of a few passes and binary searches over sorted keys: linear in tokens in practice.

    Raises `AlignmentError` for sides that break the rules of `Side`, or that disagree on where a segment stops.
    """
    check_side(student, num_segments, "student")
    check_side(teacher, num_segments, "teacher")
    # One sorted key per token for the whole batch: segments are laid out one after the other, `stride` bytes apart.
    stride = max(int(student.end.max(initial=0)), int(teacher.end.max(initial=0))) + 1
    start_s, start_t = starts(student), starts(teacher)
    at_s, at_t = np.flatnonzero(student.end > start_s), np.flatnonzero(teacher.end > start_t)  # tokens with bytes
    ends_s = student.segment[at_s] * stride + student.end[at_s]
    ends_t = teacher.segment[at_t] * stride + teacher.end[at_t]
    shared_s, shared_t = _shared_boundaries(ends_s, ends_t)
    last_s, last_t = at_s[shared_s], at_t[shared_t]  # the token that ends each chunk, [C]
    chunk_segment = student.segment[last_s]
    chunk_stop = student.stop[last_s]
    _check_stops(student, last_s, teacher, last_t)

    chunk_s = _chunk_of_tokens(student, at_s, shared_s, chunk_segment)
    chunk_t = _chunk_of_tokens(teacher, at_t, shared_t, chunk_segment)
    num_chunks = len(chunk_segment)
    count_s, inexact_s = _counts(chunk_s, student.exact, num_chunks)
    count_t, inexact_t = _counts(chunk_t, teacher.exact, num_chunks)
    chunk_exact = (inexact_s == 0) & (inexact_t == 0)
    pair = (count_s == 1) & (count_t == 1) & chunk_exact

    n_s = len(chunk_s)
    in_no_chunk = n_s - int(count_s.sum()) + len(chunk_t) - int(count_t.sum())
    return Alignment(
        num_segments=num_segments,
        chunk_s=chunk_s,
        chunk_t=chunk_t,
        chunk_segment=chunk_segment,
        count_s=count_s,
        count_t=count_t,
        chunk_exact=chunk_exact,
        chunk_stop=chunk_stop,
        pair_s=last_s[pair],
        pair_t=last_t[pair],
        teacher_at=_teacher_at(student.segment, start_s, teacher.segment, start_t, stride),
        coverage=int(count_s[chunk_exact].sum()) / n_s if n_s else 1.0,
        one_to_one=int(pair.sum()) / n_s if n_s else 1.0,
        dropped=in_no_chunk,
    )


def starts(side: Side) -> Ints:
    """Byte start of each token inside its segment, `[N]`."""
    start = np.zeros_like(side.end)
    start[1:] = np.where(side.segment[1:] == side.segment[:-1], side.end[:-1], 0)
    return start


def check_bytes(student: bytes, teacher: bytes, where: str) -> None:
    """Raise `AlignmentError` unless both sides spell the same bytes. `where` names the segment for the message."""
    if student == teacher:
        return
    n = min(len(student), len(teacher))
    differs = np.frombuffer(student, np.uint8, n) != np.frombuffer(teacher, np.uint8, n)
    at = int(differs.argmax()) if differs.any() else n
    raise AlignmentError(
        f"{where}: the two sides spell different bytes from byte {at} on: "
        f"student {student[at : at + 16]!r} of {len(student)} bytes, teacher {teacher[at : at + 16]!r} of "
        f"{len(teacher)} bytes. Render both sides from the same reply, as it was written."
    )


def _shared_boundaries(ends_s: Ints, ends_t: Ints) -> tuple[Ints, Ints]:
    """Indices into two strictly ascending arrays of the values that both hold, `[C]` each."""
    if not len(ends_s) or not len(ends_t):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    places = np.searchsorted(ends_t, ends_s)
    hit = ends_t[np.minimum(places, len(ends_t) - 1)] == ends_s
    return np.flatnonzero(hit), places[hit].astype(np.int64, copy=False)


def _chunk_of_tokens(side: Side, at: Ints, shared: Ints, chunk_segment: Ints) -> Ints:
    """Chunk of every token, `[N]`: the number of shared boundaries before it, if one more follows in its segment."""
    ends_here = np.zeros(len(at) + 1, np.int64)
    ends_here[shared + 1] = 1
    chunk = np.cumsum(ends_here)[:-1]
    beyond = np.append(chunk_segment, -1)[chunk] != side.segment[at]
    chunk[beyond] = -1
    return chunk if len(at) == len(side.end) else _spread(side.segment, at, chunk)


def _spread(segment: Ints, at: Ints, chunk: Ints) -> Ints:
    """Give tokens of zero bytes the chunk of the next token with bytes in their segment, else of the last one."""
    if not len(at):
        return np.full(len(segment), -1, np.int64)
    has_bytes = np.zeros(len(segment), np.int64)
    has_bytes[at] = 1
    following = np.cumsum(has_bytes) - has_bytes  # index into `at` of the token itself or the next one with bytes
    preceding = np.maximum(following - 1, 0)
    following = np.minimum(following, len(at) - 1)  # after the batch's last one there is none: that one itself
    from_next = segment[at[following]] == segment
    from_last = segment[at[preceding]] == segment
    return np.where(from_next, chunk[following], np.where(from_last, chunk[preceding], -1))


def _counts(chunk: Ints, exact: Bools, num_chunks: int) -> tuple[Ints, Ints]:
    """Tokens, and inexact tokens, of each chunk, `[C]` each."""
    count = np.bincount(chunk + 1, minlength=num_chunks + 1)[1:]  # bin 0 is "in no chunk"
    inexact = np.bincount(chunk[~exact] + 1, minlength=num_chunks + 1)[1:]
    return count.astype(np.int64, copy=False), inexact.astype(np.int64, copy=False)


def _teacher_at(segment_s: Ints, start_s: Ints, segment_t: Ints, start_t: Ints, stride: int) -> Ints:
    """Index of the last teacher token of the segment whose start is at or before each student token's, else -1."""
    keys_s, keys_t = segment_s * stride + start_s, segment_t * stride + start_t
    at = np.searchsorted(keys_t, keys_s, side="right").astype(np.int64, copy=False) - 1
    if not len(keys_t):
        return at
    at[segment_t[at] != segment_s] = -1
    return at


def _check_stops(student: Side, last_s: Ints, teacher: Side, last_t: Ints) -> None:
    wrong = np.flatnonzero(student.stop[last_s] != teacher.stop[last_t])
    if len(wrong):
        i, j = last_s[wrong[0]], last_t[wrong[0]]
        raise AlignmentError(
            f"segment {student.segment[i]}: a boundary at byte {student.end[i]} is the stop event of one side only "
            f"(student stop={bool(student.stop[i])}, teacher stop={bool(teacher.stop[j])}), so the sides differ in "
            "length. Render both sides from the same reply; a stop token ends at the segment's length + 1."
        )
