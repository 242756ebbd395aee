"""Markup and segments as one run of tokens, encoded together, as one text is at inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from diglot.arrays import Bools, Ints
from diglot.rendering.assemble import Piece, cut_segments
from diglot.rendering.markers import CUT
from diglot.rendering.types import Role
from diglot.vocabulary import ByteEncoder, Encoded, Vocabulary


@dataclass(frozen=True)
class Item:
    """A run of text: a segment, markup in which special tokens are recognised, or text that is read only."""

    kind: Literal["segment", "markup", "text"]
    text: str


def encode_items(encoder: ByteEncoder, items: Sequence[Item], *, start: bool = False, before: str = "") -> Piece:
    """Encode `items` as one text, with a segment for each item that is one. Roles are PROMPT before the first segment.

    What special tokens a segment spells stay text: where there are any, the items are encoded one by one.

    Args:
        start: is it the start of a text, rather than the continuation of one?
        before: the prompt that the items continue, whose last token may decide how the next word begins.
    """
    items = [item for item in items if item.text or item.kind == "segment"]
    spans = _spans(items)
    segments = [(span, item) for span, item in zip(spans, items, strict=True) if item.kind == "segment"]
    read = _together(encoder, items, start, before)
    ids, ends, exact = read or _apart(encoder, items, spans, start)
    outside = np.full(len(ids), Role.MARKUP, dtype=np.int8)
    first = segments[0][0][0] if segments else spans[-1][1] + 1 if spans else 1
    outside[ends <= first] = Role.PROMPT
    texts = [item.text.encode() for _, item in segments]
    return cut_segments(ids, ends, exact, [span for span, _ in segments], texts, outside)


def _spans(items: Sequence[Item]) -> list[tuple[int, int]]:
    """Bytes of each item in the text of all."""
    ends = np.cumsum([0, *(len(item.text.encode("utf-8", "surrogatepass")) for item in items)]).tolist()
    return list(pairwise(ends))


def _together(encoder: ByteEncoder, items: Sequence[Item], start: bool, before: str) -> tuple[Ints, Ints, Bools] | None:
    """All items as one text; None where that would read a segment as something else than text."""
    vocabulary = encoder.vocabulary
    if vocabulary.leading_space or vocabulary.trailing_space or any(item.kind == "text" for item in items):
        return None
    if not before and all(item.kind == "segment" for item in items):
        return None
    text = "".join(item.text for item in items)
    cut = any(a.kind == b.kind == "markup" for a, b in pairwise(items))  # text that must not be read as a marker
    if not text or cut or CUT in before:
        return None
    read = _continued(encoder, text, before) if before else encoder.place_markup(text, start=start)
    if read is None:
        return None
    own = sum(_controls(encoder, encoder.encode_markup(item.text)) for item in items if item.kind == "markup")
    if _controls(encoder, read.ids) != own:
        return None
    return read.ids, read.ends, read.exact


def _controls(encoder: ByteEncoder, ids: Ints) -> int:
    return int(encoder.vocabulary.control[ids].sum())


def writes_dummy_prefix(encoder: ByteEncoder, before: str) -> bool:
    """Does the tokenizer begin a word behind this prompt with a space that the text does not have?"""
    read = _continued(encoder, "Yes", before) if encoder.has_edges else None
    return read is not None and len(read.ids) > 0 and encoder.vocabulary.token(int(read.ids[0])).startswith(b" ")


def _continued(encoder: ByteEncoder, text: str, before: str) -> Encoded | None:
    """The tokens of `text` in `before + text`, where they begin at a token; a dummy prefix may stand there.

    None where the prompt swallows the beginning of the text, or joins it.
    """
    prompt, whole = encoder.encode_markup(before, start=True), encoder.place_markup(before + text, start=True)
    n, offset = len(prompt), len(before.encode())
    if whole.ids[:n].tolist() != prompt.tolist() or (n and whole.ends[n - 1] > offset):
        return None
    if not _spells(encoder.vocabulary, whole.ids[n:], text.encode()):
        return None
    return Encoded(whole.ids[n:], whole.ends[n:] - offset, whole.exact[n:])


def _spells(vocabulary: Vocabulary, ids: Ints, text: bytes) -> bool:
    """Are these the bytes of `text`, but for a dummy prefix at the start and behind control tokens?"""
    at, starts = 0, True
    for i in ids.tolist():
        control = bool(vocabulary.control[i])
        piece = vocabulary.names.get(i, "").encode() if control else vocabulary.token(i)
        if starts and piece.startswith(b" ") and not text.startswith(piece, at):
            piece = piece[1:]
        if not text.startswith(piece, at):
            return False
        at, starts = at + len(piece), control
    return at == len(text)


def _apart(
    encoder: ByteEncoder, items: Sequence[Item], spans: Sequence[tuple[int, int]], start: bool
) -> tuple[Ints, Ints, Bools]:
    """Item by item."""
    read = []
    for k, (item, (low, _)) in enumerate(zip(items, spans, strict=True)):
        first = start and k == 0
        if item.kind == "markup":
            one = encoder.place_markup(item.text, start=first)
        else:
            one = encoder.encode([item.text], start=first)[0]
        read.append((one.ids, one.ends + low, one.exact))
    if not read:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.bool_)
    ids, ends, exact = (np.concatenate(arrays) for arrays in zip(*read, strict=True))
    return ids.astype(np.int64), ends.astype(np.int64), exact.astype(np.bool_)
