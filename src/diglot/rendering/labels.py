"""Which tokens of a text are reasoning or a call of a tool, by the tags that the text itself holds."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from diglot.arrays import Ints
from diglot.rendering.assemble import Piece
from diglot.rendering.types import Role

_THINK = re.compile(rb"<think>.*?(?:</think>|\Z)", re.S)
_OPENED_THINK = re.compile(rb"\A.*?(?:</think>|\Z)", re.S)
_TOOL_CALL = re.compile(rb"<tool_call>.*?(?:</tool_call>|\Z)", re.S)


def label_segment(piece: Piece, segment: int, opened: bool) -> None:
    """Set the roles of a segment's tokens, in place."""
    inside = piece.segment == segment
    roles = piece.roles[inside]
    _label(roles, piece.ends[inside], piece.texts[segment], opened)
    piece.roles[inside] = roles


def _label(roles: NDArray[np.int8], ends: Ints, text: bytes, opened: bool) -> None:
    """Set the roles of the tokens of `text` that overlap a think block or a call, in place.

    Args:
        ends: byte at which each token ends in `text`, ascending.
        opened: does the text start inside a think block?
    """
    spans = [(m.span(), Role.TOOL_CALL) for m in _TOOL_CALL.finditer(text)] if b"<tool_call>" in text else []
    spans += [(m.span(), Role.REASONING) for m in _THINK.finditer(text)] if b"<think>" in text else []
    if opened and (first := _OPENED_THINK.match(text)):
        spans.append((first.span(), Role.REASONING))
    if not spans or not len(ends):
        return
    starts = np.concatenate([[0], ends[:-1]])
    edges = np.array([span for span, _ in spans])
    firsts = np.searchsorted(ends, edges[:, 0], side="right")
    lasts = np.searchsorted(starts, edges[:, 1], side="left")
    for first, last, (_, role) in zip(firsts.tolist(), lasts.tolist(), spans, strict=True):
        roles[first:last] = role
