"""A vocabulary as a table from token id to bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from diglot.arrays import Bools, Ints
from diglot.errors import VocabularyError
from diglot.vocabulary.cache import cached
from diglot.vocabulary.kinds import describe
from diglot.vocabulary.trie import ByteTrie


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What each id of a model's embedding stands for: bytes, or nothing (special tokens, padding of the embedding).

    Ids are rows `[V]`. Two vocabularies are the same if their tables are, whatever their sizes.
    """

    kind: str  # "byte-level", "metaspace", "wordpiece" or "suffix"
    data: NDArray[np.uint8]  # all tokens' bytes, one after the other
    offsets: Ints  # [V + 1] where each token's bytes begin
    control: Bools  # [V] no bytes: special tokens and padding rows
    names: Mapping[int, str]  # control id -> its name; padding rows have none
    leading_space: bool = False  # the first token of a text stands for its bytes without the leading space
    trailing_space: bool = False  # the last token of a text stands for its bytes without the trailing space

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, num_embeddings: int | None = None) -> Vocabulary:
        """The table of `tokenizer`, with `num_embeddings` rows if the model's embedding is larger.

        Special ids beyond the embedding are tolerated, unless they are its bos, eos or pad: some tokenizers carry a
        marker for another modality that their text model has no row for.

        Raises:
            VocabularyError: the kind of tokenizer does not say which bytes its tokens stand for, or an id that text can
                produce lies beyond the embedding.
        """
        description = describe(tokenizer)
        texts = {i: description.spell(piece) for i, piece in description.pieces.items() if i not in description.special}
        texts.update({i: content.encode() for i, content in description.added.items()})
        for i in description.special:
            texts.pop(i, None)
        size = max([*texts, *description.special], default=-1) + 1
        if num_embeddings is not None and size > num_embeddings:
            _check_beyond(tokenizer, texts, description.special, num_embeddings)
        size = num_embeddings or size
        names = {i: name for i, name in sorted(description.special.items()) if i < size}
        ids = np.fromiter(texts, dtype=np.int64, count=len(texts))
        lengths = np.zeros(size, dtype=np.int64)
        lengths[ids] = np.fromiter(map(len, texts.values()), dtype=np.int64, count=len(texts))
        control = np.ones(size, dtype=np.bool_)
        control[ids] = False
        data = np.frombuffer(b"".join([texts[i] for i in np.sort(ids).tolist()]), dtype=np.uint8)
        return cls(
            description.kind,
            data,
            np.concatenate([[0], np.cumsum(lengths)]),
            control,
            names,
            description.leading_space,
            description.trailing_space,
        )

    def __len__(self) -> int:
        return len(self.control)

    @cached_property
    def lengths(self) -> Ints:
        """Bytes of each token, [V]."""
        return np.diff(self.offsets)

    @cached_property
    def word_starts(self) -> Ints:
        """Ids of the tokens whose first byte is a space, a tab or a line break."""
        texts = np.flatnonzero(self.lengths > 0)
        return texts[np.isin(self.data[self.offsets[texts]], np.frombuffer(b" \t\n\r", dtype=np.uint8))]

    @cached_property
    def word_cuts(self) -> frozenset[int]:
        """Bytes of white space that no token has behind another byte: a text is cut before them, whatever follows."""
        space = np.isin(self.data, np.frombuffer(b" \t\n\r", dtype=np.uint8))
        inside = np.ones(len(self.data), dtype=np.bool_)
        inside[self.offsets[:-1][self.lengths > 0]] = False
        crossed = self.data[1:][inside[1:] & space[1:] & ~space[:-1]]
        return frozenset(b" \t\n\r") - frozenset(crossed.tolist())

    @cached_property
    def trie(self) -> ByteTrie:
        """All tokens in order of their bytes."""
        return ByteTrie(**cached("trie", [self], lambda: vars(ByteTrie.of(self))))

    def token(self, token_id: int) -> bytes:
        """The bytes of one token. Raises `VocabularyError` for an id outside [0, V)."""
        if not 0 <= token_id < len(self.control):
            raise VocabularyError(
                f"Token id {token_id} is not in this vocabulary of {len(self.control)} rows. It is a mask value "
                "such as -100, or the ids were made by another tokenizer: pass only ids of this model."
            )
        raw, offsets = self._plain
        return raw[offsets[token_id] : offsets[token_id + 1]]

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each of `ids`, whole numbers of Python. Raises `VocabularyError` for an id outside [0, V)."""
        if ids and (min(ids) < 0 or max(ids) >= len(self.control)):
            return list(map(self.token, ids))  # says which one
        raw, offsets = self._plain
        return [raw[offsets[i] : offsets[i + 1]] for i in ids]

    @cached_property
    def _plain(self) -> tuple[bytes, list[int]]:
        """Data and offsets as plain Python, where a look at one token is several times as fast."""
        return self.data.tobytes(), self.offsets.tolist()

    def tokens(self) -> list[bytes]:
        """The bytes of each id, `[V]`; control tokens have none."""
        raw, offsets = self._plain
        return [raw[low:high] for low, high in pairwise(offsets)]

    def bytes_of(self, ids: Sequence[int] | NDArray[Any]) -> bytes:
        """The bytes of `ids`, one after the other. Raises `VocabularyError` for an id outside [0, V)."""
        return b"".join(self.pieces([int(i) for i in ids]))

    def at_edges(self, pieces: list[bytes], text: bytes) -> list[bytes]:
        """The pieces of a whole text as they stand in it: a first or last space that the text lacks is left out."""
        pieces = list(pieces)
        if pieces and self.leading_space and not text[:1].isspace():
            pieces[0] = pieces[0].removeprefix(b" ")
        if pieces and self.trailing_space and not text[-1:].isspace():
            pieces[-1] = pieces[-1].removesuffix(b" ")
        return pieces

    def ends_in(self, text: bytes, ids: Sequence[int]) -> Ints:
        """The byte of `text` at which each of the tokens that it is written with (`ByteEncoder.spell`) ends, `[n]`."""
        return np.cumsum(list(map(len, self.at_edges(self.pieces(ids), text))), dtype=np.int64)

    def display(self, token_id: int) -> str:
        """A token for people: its text, hex digits for bytes that are no text, the name of a control token."""
        if self.control[token_id]:
            return self.names.get(int(token_id), f"[row {token_id}]")
        raw = self.token(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "".join(f"\\x{b:02x}" for b in raw)

    @cached_property
    def _identity(self) -> dict[int, bytes | str]:
        """Id -> bytes, or name of a control token; without padding rows."""
        tokens = self.tokens()
        texts: dict[int, bytes | str] = {i: tokens[i] for i in np.flatnonzero(~self.control).tolist()}
        return {**texts, **self.names}

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of the table and the names of control tokens, without padding rows."""
        ids = np.flatnonzero(~self.control).astype("<i8")
        digest = hashlib.sha256(len(ids).to_bytes(8, "little"))
        for part in (ids, self.lengths[ids].astype("<i8"), self.data):  # no other id has bytes in `data`
            digest.update(part.tobytes())
        digest.update(json.dumps(sorted(self.names.items())).encode())
        return digest.hexdigest()

    def same_as(self, other: Vocabulary) -> bool:
        """Are both tables equal? Padding rows at the end do not count."""
        return self is other or self.content_hash == other.content_hash

    def explain_difference(self, other: Vocabulary) -> str:
        """What differs, in one sentence; empty when the tables are the same."""
        if self.same_as(other):
            return ""
        mine, theirs = self._identity, other._identity
        missing, extra = len(mine.keys() - theirs.keys()), len(theirs.keys() - mine.keys())
        differing = sorted(i for i in mine.keys() & theirs.keys() if mine[i] != theirs[i])
        parts = [f"{len(mine):,} tokens against {len(theirs):,}"]
        if missing or extra:
            parts.append(f"{missing:,} ids only in the first, {extra:,} only in the second")
        if differing:
            first = differing[0]
            parts.append(
                f"{len(differing):,} ids stand for other text (the first is {first}: {self.display(first)!r} against "
                f"{other.display(first)!r})"
            )
        return "; ".join(parts)

    def padding_note(self, other: Vocabulary) -> str:
        """Says so when equal tables have embeddings of unequal size; else empty."""
        if not self.same_as(other) or len(self) == len(other):
            return ""
        return (
            f"The embeddings have {len(self)} and {len(other)} rows but the tokens are the same: the larger one is "
            "padded. The padding rows are left out."
        )

    def shared(self, other: Vocabulary) -> tuple[Ints, Ints]:
        """Ids here and there of all tokens with equal bytes, ascending here.

        Left out: control tokens, empty tokens, and bytes that two ids of one vocabulary share.
        """
        ids = cached("shared", [self, other], lambda: self._shared(other))
        return ids["mine"], ids["theirs"]

    def _shared(self, other: Vocabulary) -> dict[str, Ints]:
        mine, theirs = self._unambiguous, other._unambiguous
        ids = [(i, theirs[raw]) for raw, i in mine.items() if raw in theirs]  # ascending, as `mine` is
        pairs = np.array(ids, dtype=np.int64).reshape(-1, 2)
        return {"mine": pairs[:, 0].copy(), "theirs": pairs[:, 1].copy()}

    @cached_property
    def _unambiguous(self) -> dict[bytes, int]:
        """Bytes -> id, ascending, of the bytes that exactly one id has."""
        id_of: dict[bytes, int] = {}
        ambiguous = {b""}
        for i, raw in enumerate(self.tokens()):
            if id_of.setdefault(raw, i) != i:
                ambiguous.add(raw)
        for raw in ambiguous:
            id_of.pop(raw, None)
        return id_of


def _check_beyond(
    tokenizer: PreTrainedTokenizerBase, texts: Mapping[int, bytes], special: Mapping[int, str], num_embeddings: int
) -> None:
    """Raise `VocabularyError` if an id beyond the embedding can occur in plain use."""
    needed = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    beyond = [i for i in (*texts, *special) if i >= num_embeddings]
    wrong = [i for i in beyond if i in texts or i in needed]
    if wrong:
        raise VocabularyError(
            f"The tokenizer has ids up to {max(wrong)}, the embedding has {num_embeddings} rows: they do not belong "
            "together. Give the tokenizer that the model was trained with (for a teacher: "
            "teacher_tokenizer_name_or_path)."
        )
