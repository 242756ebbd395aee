"""Text to ids with the byte offset at which each token ends, and whether its bytes are those of the text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase

from diglot.errors import VocabularyError
from diglot.vocabulary.kinds import component
from diglot.vocabulary.table import Vocabulary

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Encoded:
    """One text as tokens, arrays [n]."""

    ids: Ids
    ends: NDArray[np.int64]  # byte offset in the text at which each token ends
    exact: NDArray[np.bool_]  # are the token's bytes the bytes of the text there?


@dataclass(frozen=True)
class _Tokens:
    """What the library's encoding of one text says that is used here."""

    ids: Sequence[int]
    offsets: Sequence[tuple[int, int]]  # characters of the text, to be checked before they are believed

    @classmethod
    def of(cls, encoding: Encoding) -> _Tokens:
        return cls(encoding.ids, encoding.offsets)


class ByteEncoder:
    """Encodes text as the continuation of something: nothing is added, and special tokens are read as plain text.

    Works on private copies of the tokenizer's backend; the tokenizer itself is left as it is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._backend = _without_prefix(tokenizer)
        unknown = getattr(tokenizer, "unk_token_id", None)
        # In byte-level BPE no merge leads to a special token; elsewhere its name may be a piece like any other.
        plain = vocabulary.kind == "byte-level"
        self._names = {} if plain else {i: n for i, n in vocabulary.names.items() if i != unknown}
        self.bos_ids = _bos_ids(tokenizer)
        self._check_itself()

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Each text as tokens, with `ends[-1]` the length of the text in bytes.

        Where a normaliser changed the text, or the vocabulary cannot write it, the tokens of the region are not
        `exact`; all
        of them but the last end where the region starts. A text for which there is no token at all gives empty arrays.

        Raises:
            VocabularyError: a text holds a lone surrogate, which has no bytes.
        """
        for i, text in enumerate(texts):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise VocabularyError(
                    f"Text {i} holds the lone surrogate {text[error.start]!r} at character {error.start}, "
                    f"which has no bytes. "
                    "Remove or replace it in the data."
                ) from None
        self._backend.encode_special_tokens = (
            True  # as plain text, that is: the library's name for not recognising them
        )
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [
            self._spans(
                text, self._apart(text) if self._names and self._names_in(encoding.ids) else _Tokens.of(encoding)
            )
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def encode_markup(self, text: str) -> Ids:
        """Ids of text in which special tokens are recognised; nothing is added."""
        self._backend.encode_special_tokens = False
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def _names_in(self, ids: Sequence[int]) -> bool:
        return any(i in self._names for i in ids)

    def _apart(self, text: str) -> _Tokens:
        """Tokens of a text in which a Unigram model found the name of a special token among its pieces.

        Each such name is cut behind its first character, so that it is spelt out. A name of one character stays.
        """
        names = sorted((n for n in self._names.values() if len(n) > 1), key=len, reverse=True)
        cuts = [m.start() + 1 for m in re.finditer("|".join(map(re.escape, names)), text)]
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, stop in pairwise([0, *cuts, len(text)]):
            part = self._backend.encode(text[start:stop], add_special_tokens=False)
            ids += part.ids
            offsets += [(low + start, high + start) for low, high in part.offsets]
        return _Tokens(ids, offsets)

    def _spans(self, text: str, encoding: _Tokens) -> Encoded:
        ids = np.array(encoding.ids, dtype=np.int64)
        spelt = [self.vocabulary.token(i) for i in ids]
        if spelt and self.vocabulary.leading_space and spelt[0][:1] == b" ":
            spelt[0] = spelt[0][1:]
        source = text.encode()
        if b"".join(spelt) == source and not self.vocabulary.control[ids].any():
            ends = np.cumsum([len(s) for s in spelt], dtype=np.int64)
            return Encoded(ids, ends.reshape(-1), np.ones(len(ids), dtype=np.bool_))
        return _regions(text, encoding, ids, spelt, self.vocabulary.control[ids])

    def _check_itself(self) -> None:
        """A table that does not spell what the tokenizer reads is refused before anybody trusts it."""
        probe = "Hello world, 12 x\n"
        encoded = self.encode([probe])[0]
        if len(encoded.ids) and not encoded.exact.any():
            raise VocabularyError(
                f"The tokens of {probe!r} spell {self.vocabulary.bytes_of(encoded.ids)!r}: not one of them is "
                f"as in the text. "
                f"The tokenizer was taken for {self.vocabulary.kind}; it must be of another kind, which is not "
                f"supported."
            )


def _regions(text: str, encoding: _Tokens, ids: Ids, spelt: list[bytes], control: NDArray[np.bool_]) -> Encoded:
    """Spans of a text that its tokens do not spell, from character offsets, of which nothing is believed unchecked.

    Tokens with overlapping offsets form a group; characters that no token covers belong to the group after them, or
    to the
    last. A group is exact if its bytes are those of its characters. Groups that are not, in a row, are one region.
    """
    num_bytes = np.cumsum([0, *(len(c.encode()) for c in text)])
    groups = _groups(encoding.offsets, len(text))
    ends, exact = np.zeros(len(ids), dtype=np.int64), np.zeros(len(ids), dtype=np.bool_)
    region_start = 0
    for first, last, start, stop in groups:
        low, high = int(num_bytes[start]), int(num_bytes[stop])
        right = b"".join(spelt[first:last]) == text[start:stop].encode() and not control[first:last].any()
        if right:
            ends[first:last] = low + np.cumsum([len(s) for s in spelt[first:last]])
            exact[first:last] = True
            region_start = high
        else:  # this group ends the region so far: all tokens before its last stand at the region's start
            begin = first
            while begin > 0 and not exact[begin - 1]:
                begin -= 1
            ends[begin : last - 1] = region_start
            ends[last - 1] = high
    return Encoded(ids, ends, exact)


def _groups(offsets: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int, int, int]]:
    """Groups (first token, last token + 1, first character, last character + 1) that partition the text.

    If the offsets are out of order everything is one group.
    """
    whole = [(0, len(offsets), 0, length)] if offsets else []
    groups: list[list[int]] = []
    reached = 0
    for i, (start, stop) in enumerate(offsets):
        if groups and (start < reached or stop <= start):
            if start < groups[-1][2] and stop > start:
                return whole
            groups[-1][1], groups[-1][3] = i + 1, max(groups[-1][3], stop)
        else:
            groups.append([i, i + 1, reached, stop])
        reached = max(reached, groups[-1][3])
    if groups:
        groups[-1][3] = length
    if any(g[3] < g[2] for g in groups):
        return whole
    return [(g[0], g[1], g[2], g[3]) for g in groups]


def _without_prefix(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the backend that puts nothing before or after a text: no template, no dummy prefix, no truncation."""
    backend: Tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    parts = {
        "normalizer": _strip(component(backend.normalizer), "normalizers"),
        "pre_tokenizer": _strip(component(backend.pre_tokenizer), "pretokenizers"),
    }
    # The library builds components only from a whole description: let an empty tokenizer carry them over.
    empty = json.dumps({**json.loads(Tokenizer(BPE()).to_str()), **parts})
    carrier = Tokenizer.from_str(empty)
    backend.normalizer, backend.pre_tokenizer = carrier.normalizer, carrier.pre_tokenizer
    return backend


def _strip(part: Any, key: str) -> Any:
    """The component without a `▁` or space that it would put before the text."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    if part["type"] == "ByteLevel" and key == "pretokenizers":
        return {**part, "add_prefix_space": False}
    if key in part:
        return {**part, key: [kept for inner in part[key] if (kept := _strip(inner, key)) is not None]}
    return part


def _bos_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer puts before plain text of its own accord."""
    with_special = tokenizer("a", add_special_tokens=True)["input_ids"]
    without = tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(with_special) - len(without) + 1):
        if with_special[start : start + len(without)] == without:
            return tuple(with_special[:start])
    return ()
