"""Pieces of a rendering put together, and cut to a length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from diglot.errors import DataError
from diglot.rendering.types import Rendered, Role

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """A run of tokens; a segment if `text` is not None."""

    ids: Ids
    roles: NDArray[np.int8]
    ends: NDArray[np.int64]
    exact: NDArray[np.bool_]
    text: bytes | None = None
    stopped: bool = False

    @classmethod
    def plain(cls, ids: Ids, role: Role) -> Piece:
        """Tokens that are not scored, all of one role."""
        n = len(ids)
        return cls(ids, np.full(n, role, dtype=np.int8), np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.bool_))

    @classmethod
    def prompt(cls, ids: Ids) -> Piece:
        """Tokens that are read only."""
        return cls.plain(np.asarray(ids, dtype=np.int64), Role.PROMPT)

    @classmethod
    def unscored(cls, ids: Ids, control: NDArray[np.bool_]) -> Piece:
        """What follows the scored part of a completion."""
        return replace(cls.plain(ids, Role.CONTENT), roles=np.where(control, Role.MARKUP, Role.CONTENT).astype(np.int8))

    def with_stop(self, stop_id: int) -> Piece:
        """The segment with its stop token, one byte beyond its text.

        It is exact only if the tokens before it reach the end of the text: a tokenizer that cannot write a text at
        all gives no token for it, and its stop must not pass for the text's.
        """
        assert self.text is not None
        reached = int(self.ends[-1]) if len(self.ends) else 0
        return replace(
            self,
            ids=np.append(self.ids, stop_id),
            roles=np.append(self.roles, np.int8(Role.STOP)),
            ends=np.append(self.ends, len(self.text) + 1),
            exact=np.append(self.exact, reached == len(self.text)),
        )


def assemble(pieces: Sequence[Piece]) -> Rendered:
    """One `Rendered` of pieces in order; segments are numbered as they come."""
    segment: list[NDArray[np.int32]] = []
    texts: list[bytes] = []
    stopped: list[bool] = []
    for piece in pieces:
        segment.append(np.full(len(piece.ids), -1 if piece.text is None else len(texts), dtype=np.int32))
        if piece.text is not None:
            texts.append(piece.text)
            stopped.append(piece.stopped)
    return Rendered(
        ids=np.concatenate([p.ids for p in pieces]).astype(np.int64),
        roles=np.concatenate([p.roles for p in pieces]).astype(np.int8),
        segment=np.concatenate(segment),
        end=np.concatenate([p.ends for p in pieces]).astype(np.int64),
        exact=np.concatenate([p.exact for p in pieces]).astype(np.bool_),
        segment_bytes=tuple(texts),
        stopped=tuple(stopped),
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
    had, kept = rendered.segment >= 0, rendered.segment[:max_length] >= 0
    if had.any() and not kept.any():
        first = int(np.flatnonzero(had)[0])
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
