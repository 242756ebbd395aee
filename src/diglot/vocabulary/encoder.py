"""Encode text as bytes with an owner: which token ends at which byte, and is it exactly the bytes of the text?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from transformers import PreTrainedTokenizerBase

from diglot.arrays import Bools, Ints
from diglot.errors import VocabularyError
from diglot.vocabulary.backend import BackendEncoder, Spans
from diglot.vocabulary.probes import PROBES, check_spelling
from diglot.vocabulary.table import Vocabulary

Speller = Callable[[Sequence[bytes]], Sequence[list[int] | None]]  # `ByteEncoder.spell` of one side


@dataclass(frozen=True)
class Encoded:
    """One encoded text of `length` bytes as `n` tokens.

    ids: [n] int64. ends: [n] int64, token `i` covers the bytes from `ends[i - 1]` (0 for the first) to `ends[i]`.
    exact: [n] bool, whether the token's bytes are those bytes of the text.

    A run of tokens with `exact` False is one region that cannot be aligned inside: all but its last token end where the
    region starts, the last ends where the region ends. A control token of markup is a region by itself.
    """

    ids: Ints
    ends: Ints
    exact: Bools


class ByteEncoder:
    """Encodes text as the continuation of other text, and knows the bytes of every token that it gives.

    bos_ids: what the tokenizer itself puts before plain text; may be empty.
    """

    bos_ids: tuple[int, ...]

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> None:
        """
        Args:
            tokenizer: the tokenizer that `vocabulary` was read from. It is copied, never changed.
            vocabulary: its table.

        Raises:
            VocabularyError: the table does not spell what the tokenizer reads.
        """
        self.vocabulary = vocabulary
        self._encoder = BackendEncoder(tokenizer, vocabulary.names)
        check_spelling(vocabulary, (spans.ids for spans in self._encoder.spans(PROBES)))
        self.bos_ids = tuple(self._encoder.bos_ids())

    @property
    def has_edges(self) -> bool:
        """Does the tokenizer write a dummy prefix at the start of a text?"""
        return self._encoder.has_edges

    def encode(self, texts: Sequence[str], *, start: bool = False) -> list[Encoded]:
        """Encode each text, as a continuation or, with `start`, as the tokenizer itself writes the start of a text.

        Nothing is added before or after, and the names of special tokens in a text are spelt out as text. The only
        control id that can come out is the unknown token, never exact.

        `ends[-1]` is the length of the text in bytes, except where a text gives no token at all (an empty one, or one
        that the tokenizer drops whole): then all three arrays are empty.

        Raises:
            VocabularyError: a text that is not Unicode text, because it holds a lone surrogate.
        """
        if isinstance(texts, str):
            raise VocabularyError("encode takes a list of texts and was given one string: pass [text].")
        sources = [_utf8(text, where) for where, text in enumerate(texts)]
        spans = self._encoder.spans(texts, start=start)
        return [self._place(*item) for item in zip(texts, sources, spans, strict=True)]

    def spell(self, texts: Sequence[bytes]) -> list[list[int] | None]:
        """The ids of each text as a continuation, for many short ones: about a third of the time that `encode` takes.

        None for bytes that are no text by themselves, and where the tokens' bytes are not those of the text: there
        `encode` says which ones are.
        """
        ids_of: list[list[int] | None] = [None] * len(texts)
        place, as_text = list[int](), list[str]()
        for k, raw in enumerate(texts):
            try:
                as_text.append(raw.decode("utf-8"))
            except UnicodeDecodeError:
                continue
            place.append(k)
        for k, ids in zip(place, self._encoder.ids(as_text) if as_text else (), strict=True):
            if self._written(ids, texts[k])[1]:
                ids_of[k] = ids
        return ids_of

    def encode_markup(self, text: str, *, start: bool = False) -> Ints:
        """Ids [n] of a text in which special tokens are recognised. Nothing is added.

        With `start` they are what the tokenizer itself gives for the whole text, a dummy prefix included; without it
        the text continues another.

        Raises:
            VocabularyError: a text that is not Unicode text, because it holds a lone surrogate.
        """
        _utf8(text, 0)
        return np.array(self._encoder.markup(text, start=start).ids, dtype=np.int64)

    def place_markup(self, text: str, *, start: bool = False) -> Encoded:
        """`encode_markup` with the byte of the text at which each token ends. Control tokens are never exact."""
        return self._place(text, _utf8(text, 0), self._encoder.markup(text, start=start))

    def _place(self, text: str, source: bytes, spans: Spans) -> Encoded:
        ids = np.array(spans.ids, dtype=np.int64)
        pieces, fits = self._written(spans.ids, source)
        if fits:
            return Encoded(ids, _running(pieces), np.ones(len(ids), dtype=bool))
        exact, ends = _check_groups(text, source, spans, pieces, self.vocabulary)
        return Encoded(ids, ends, exact)

    def _written(self, ids: list[int], source: bytes) -> tuple[list[bytes], bool]:
        """The bytes that each token of a text stands for, and if all of them, one after the other, are the text."""
        pieces = self.vocabulary.pieces(ids)
        is_text = all(pieces)  # control tokens have no bytes
        pieces = self.vocabulary.at_edges(pieces, source)
        return pieces, is_text and b"".join(pieces) == source


def _utf8(text: str, where: int) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise VocabularyError(
            f"Text {where} holds the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, which "
            "has no bytes in UTF-8. It was probably cut in the middle of a character: clean the text first."
        ) from error


def _running(pieces: Sequence[bytes]) -> Ints:
    return np.array(list(accumulate(map(len, pieces))), dtype=np.int64)  # pieces are few: NumPy's own sum is slower


def _check_groups(
    text: str, source: bytes, spans: Spans, pieces: list[bytes], vocabulary: Vocabulary
) -> tuple[Bools, Ints]:
    """Token by token (exact, end), where the tokens' bytes are not, as a whole, the bytes of the text.

    Tokens whose characters overlap are one group. A group is exact if its bytes are the bytes of its characters.
    """
    names = vocabulary.names
    groups = _groups(spans, len(text), gap_before=not vocabulary.trailing_space)
    offsets = _byte_offsets(text)
    exact = np.zeros(len(pieces), dtype=bool)
    ends = np.zeros(len(pieces), dtype=np.int64)
    region = 0  # where the current inexact region starts
    for first, last, start, stop in groups:
        low, high = offsets[start], offsets[stop]
        known = not vocabulary.control[spans.ids[first:last]].any()
        if known and b"".join(pieces[first:last]) == source[low:high]:
            exact[first:last] = True
            ends[first:last] = low + _running(pieces[first:last])
            region = high
        elif last == first + 1 and names.get(spans.ids[first], "").encode() == source[low:high].strip():
            # Markup: no text, but there is no doubt where it ends, so it closes the region before it.
            if first > 0 and not exact[first - 1]:
                ends[first - 1] = low
            ends[first], region = high, high
        else:
            # A region grows over the groups that follow, so the token before this group is no longer its last.
            if first > 0 and not exact[first - 1]:
                ends[first - 1] = region
            ends[first:last] = region
            ends[last - 1] = high
    return exact, ends


def _groups(spans: Spans, length: int, gap_before: bool) -> list[tuple[int, int, int, int]]:
    """(first token, last token + 1, first character, last character + 1), which together cover all `length` characters.

    Characters that no token came from belong to the group after them (`gap_before`) or to the one before them; those at
    the end of the text to the last group, those at its start to the first. Spans that do not ascend give one group.
    """
    ids, (starts, stops) = spans.ids, spans.characters()
    if not ids:
        return []
    if not _ascending(starts, length) or not _ascending(stops, length):
        return [(0, len(ids), 0, length)]
    firsts = [0]
    for at in range(1, len(ids)):
        if starts[at] >= stops[at - 1]:
            firsts.append(at)
    lasts = [*firsts[1:], len(ids)]
    cuts = [stops[last - 1] for last in lasts[:-1]] if gap_before else [starts[first] for first in firsts[1:]]
    return list(zip(firsts, lasts, [0, *cuts], [*cuts, length], strict=True))


def _ascending(values: Sequence[int], length: int) -> bool:
    return all(low <= high for low, high in zip([0, *values], [*values, length], strict=True))


def _byte_offsets(text: str) -> Ints:
    """[characters + 1] byte at which each character of the text starts, and the length in bytes at the end."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate([[0], np.cumsum(widths)]).astype(np.int64)
