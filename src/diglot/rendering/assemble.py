"""Pieces of a rendering put together, and cut to a length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from diglot.arrays import Bools, Ids
from diglot.errors import DataError
from diglot.rendering.types import Rendered, Reply, Role


@dataclass(frozen=True)
class Piece:
    """A run of tokens, some of them in segments; arrays are per token, [n]."""

    ids: Ids
    roles: NDArray[np.int8]
    ends: Ids
    exact: Bools
    segment: NDArray[np.int32]  # among those of this piece, -1: none
    texts: tuple[bytes, ...] = ()
    stopped: tuple[bool, ...] = ()

    @classmethod
    def plain(cls, ids: Ids, role: Role | NDArray[np.int8]) -> Piece:
        """Tokens that are not scored."""
        n = len(ids)
        roles = np.full(n, role, dtype=np.int8) if isinstance(role, Role) else role
        return cls(ids, roles, np.zeros(n, np.int64), np.zeros(n, np.bool_), np.full(n, -1, np.int32))

    @classmethod
    def prompt(cls, ids: Ids) -> Piece:
        """Tokens that are read only."""
        return cls.plain(np.asarray(ids, dtype=np.int64), Role.PROMPT)

    def with_stop(self, at: int, segment: int) -> Piece:
        """The token `at` as the stop of a segment, one byte beyond its text.

        It is exact only if the tokens before it reach the end of the text: a tokenizer that cannot write a text at
        all gives no token for it, and its stop must not pass for the text's.
        """
        inside, length = self.ends[self.segment == segment], len(self.texts[segment])
        reached = int(inside[-1]) if len(inside) else 0
        changed = replace(self, **{name: getattr(self, name).copy() for name in ("roles", "ends", "exact", "segment")})
        changed.roles[at], changed.ends[at], changed.segment[at] = Role.STOP, length + 1, segment
        changed.exact[at] = reached == length
        return replace(changed, stopped=(*self.stopped[:segment], True, *self.stopped[segment + 1 :]))


def cut_segments(
    ids: Ids,
    ends: Ids,
    exact: Bools,
    spans: Sequence[tuple[int, int]],
    texts: Sequence[bytes],
    outside: NDArray[np.int8],
) -> Piece:
    """Tokens over one text, with the segments at `spans` of its bytes. Roles of segments' tokens are set to CONTENT.

    A token over the edge of a segment is a part of it that is not exact: it stands for more than the segment's bytes.

    Args:
        ends: byte at which each token ends in the text.
        texts: of each segment, as long as its span.
        outside: roles of the tokens in no segment.
    """
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64) if len(ends) else ends
    piece = Piece.plain(ids, outside.astype(np.int8).copy())
    free = 0  # the first token that no segment has
    for k, (low, high) in enumerate(spans):
        first = max(int(np.searchsorted(ends, low, side="right")), free)
        last = max(int(np.searchsorted(starts, high, side="left")), first) if high > low else first
        if last == first:
            continue
        inside = slice(first, last)
        piece.segment[inside], piece.roles[inside] = k, Role.CONTENT
        piece.ends[inside] = np.minimum(ends[inside], high) - low
        piece.exact[inside] = exact[inside]
        piece.exact[first] &= starts[first] == low
        piece.exact[last - 1] &= ends[last - 1] <= high
        free = last
    return replace(piece, texts=tuple(texts), stopped=(False,) * len(texts))


def join(pieces: Sequence[Piece]) -> Piece:
    """Pieces in order as one; only the first may have segments."""
    arrays = {
        name: np.concatenate([getattr(p, name) for p in pieces])
        for name in ("ids", "roles", "ends", "exact", "segment")
    }
    return Piece(**arrays, texts=pieces[0].texts, stopped=pieces[0].stopped)


def assemble(pieces: Sequence[Piece], reply: Reply | None = None, own_markup: int = 0) -> Rendered:
    """One `Rendered` of pieces in order; segments are numbered as they come."""
    segment: list[NDArray[np.int32]] = []
    count = 0
    for piece in pieces:
        segment.append(np.where(piece.segment >= 0, piece.segment + count, -1).astype(np.int32))
        count += len(piece.texts)
    return Rendered(
        ids=np.concatenate([p.ids for p in pieces]).astype(np.int64),
        roles=np.concatenate([p.roles for p in pieces]).astype(np.int8),
        segment=np.concatenate(segment),
        end=np.concatenate([p.ends for p in pieces]).astype(np.int64),
        exact=np.concatenate([p.exact for p in pieces]).astype(np.bool_),
        segment_bytes=tuple(text for p in pieces for text in p.texts),
        stopped=tuple(stop for p in pieces for stop in p.stopped),
        reply=reply,
        own_markup=own_markup,
    )


def truncate(rendered: Rendered, max_length: int) -> Rendered:
    """The first `max_length` tokens. Segments that lose tokens lose their end: shorter text, not stopped.

    The number of segments stays. A cut never leaves half a character, nor part of a region that is not exact: tokens
    of a segment after its last whole one are no longer scored.

    Raises:
        DataError: no token of any segment would be left, though there were some.
    """
    if len(rendered.ids) <= max_length:
        return rendered
    scored, remaining = rendered.segment >= 0, rendered.segment[:max_length] >= 0
    if scored.any() and not remaining.any():
        first = int(np.flatnonzero(scored)[0])
        raise DataError(
            f"The prompt has {first} tokens, which leaves nothing to score within {max_length}. Shorten the prompt or "
            "raise max_length (teacher_max_length for the teacher)."
        )
    segment, end = rendered.segment[:max_length].copy(), rendered.end[:max_length].copy()
    texts, stopped = list(rendered.segment_bytes), list(rendered.stopped)
    for k, text in enumerate(texts):
        inside = np.flatnonzero(segment == k)
        if len(inside) == int((rendered.segment == k).sum()):
            continue
        ends = end[inside]
        # Of a region that is not exact only the last token moves on; those before it are nothing without it.
        moves = rendered.exact[inside] | (np.diff(ends, prepend=0) > 0)
        good = [i for i, e in enumerate(ends) if moves[i] and _is_boundary(text, int(e))]
        limit = int(ends[good[-1]]) if good else 0
        lost = inside[good[-1] + 1 :] if good else inside
        segment[lost], end[lost] = -1, 0
        texts[k], stopped[k] = text[:limit], False
    return replace(
        rendered,
        ids=rendered.ids[:max_length],
        roles=rendered.roles[:max_length],
        segment=segment,
        end=end,
        exact=rendered.exact[:max_length],
        segment_bytes=tuple(texts),
        stopped=tuple(stopped),
    )


def _is_boundary(text: bytes, offset: int) -> bool:
    """Does a character end at `offset`?"""
    return offset >= len(text) or (text[offset] & 0xC0) != 0x80
