"""The table of a tokenizer: one row of bytes for every id."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diglot.errors import VocabularyError
from diglot.vocabulary.source import TokenSource, read_source

Ids = Sequence[int] | NDArray[np.integer]


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Which bytes does a token id stand for?

    Rows: `V = max(num_embeddings, largest id + 1)`. A row is either bytes, or control: a special token, the unknown token,
    or a row of the embedding that no token uses. Control rows have no bytes.

    Attributes:
        kind: "byte-level", "metaspace", "wordpiece", "suffix" or "plain": how the tokenizer writes bytes.
        table: [V] the bytes of each id, b"" for control.
        control: [V] bool, True for ids without bytes.
        names: control id -> its name; rows that no token uses are absent.
        num_embeddings: rows of the model's embedding, None if not given.
        first_drops_space: the first token of a text loses its leading space (WordPiece, words with their own prefix).
        last_drops_space: the last token of a text loses its trailing space (end-of-word suffixes).
    """

    kind: str
    table: tuple[bytes, ...] = field(repr=False)
    control: NDArray[np.bool_] = field(repr=False)
    names: Mapping[int, str] = field(repr=False)
    num_embeddings: int | None = None
    first_drops_space: bool = False
    last_drops_space: bool = False

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, num_embeddings: int | None = None) -> Vocabulary:
        """Read the table of a `transformers` tokenizer.

        Args:
            tokenizer: a tokenizer with a `tokenizers` backend, or one with a SentencePiece model. It is not changed.
            num_embeddings: rows of the model's embedding. Rows beyond the tokenizer's ids are padding: control, no name.

        A special token beyond `num_embeddings` that is not bos, eos or pad is tolerated: such a model never reads it
        (Gemma 3's image token). The table then has rows up to that id, and `unreachable_ids` lists it.

        Raises:
            VocabularyError: the bytes of the tokens cannot be known, or the table disagrees with what the tokenizer
                writes, or an id that has bytes, or bos, eos or pad, lies beyond `num_embeddings`.
        """
        source = read_source(tokenizer)
        rows = max([num_embeddings or 0, *(token_id + 1 for token_id in source.ids())])
        table = [b""] * rows
        control = np.ones(rows, dtype=bool)
        for token_id, data in source.pieces.items():
            table[token_id] = data
            control[token_id] = False
        control.flags.writeable = False
        vocabulary = cls(
            kind=source.kind,
            table=tuple(table),
            control=control,
            names=dict(sorted(source.names.items())),
            num_embeddings=num_embeddings,
            first_drops_space=source.first_drops_space,
            last_drops_space=source.last_drops_space,
        )
        _check_size(vocabulary, source)
        _check_spelling(vocabulary, source)
        return vocabulary

    def __len__(self) -> int:
        """V, the rows of the table."""
        return len(self.table)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[V] number of bytes of each id."""
        lengths = np.fromiter(map(len, self.table), dtype=np.int64, count=len(self.table))
        lengths.flags.writeable = False
        return lengths

    def bytes_of(self, ids: Ids) -> bytes:
        """The bytes of the ids, one after the other. Control ids give nothing.

        Raises:
            VocabularyError: an id outside [0, V).
        """
        return b"".join(self.pieces_of(ids))

    def pieces_of(self, ids: Ids) -> list[bytes]:
        """The bytes of each id. Errors as for `bytes_of`."""
        plain = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        if plain and (min(plain) < 0 or max(plain) >= len(self.table)):
            wrong = min(plain) if min(plain) < 0 else max(plain)
            raise VocabularyError(
                f"Token id {wrong} is not in this vocabulary of {len(self.table)} ids. The ids were probably made by "
                "another tokenizer, or hold a mask value such as -100: pass only this model's ids."
            )
        return [self.table[token_id] for token_id in plain]

    def display(self, token_id: int) -> str:
        r"""One token for people: its text, `\xNN` for bytes that are not text alone, the name of a control token."""
        data = self.pieces_of([token_id])[0]
        if self.control[token_id]:
            return self.names.get(int(token_id), f"<unused {int(token_id)}>")
        text = data.decode("utf-8", "backslashreplace")
        return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)

    @cached_property
    def used(self) -> int:
        """Rows of the table up to the last one that some token uses; what follows is padding."""
        named = max(self.names, default=-1)
        spelt = np.flatnonzero(~self.control)
        return max(named, int(spelt[-1]) if spelt.size else -1) + 1

    @property
    def unreachable_ids(self) -> tuple[int, ...]:
        """Ids beyond the model's embedding. They are special tokens that the model never reads."""
        if self.num_embeddings is None:
            return ()
        return tuple(range(self.num_embeddings, self.used))

    @cached_property
    def content_hash(self) -> str:
        """SHA-256, in hex, over the bytes and the control names of the used rows. Padding rows do not count."""
        digest = hashlib.sha256(b"diglot vocabulary 1\n")
        digest.update(self.lengths[: self.used].astype("<i8").tobytes())
        digest.update(np.packbits(self.control[: self.used]).tobytes())
        digest.update(b"".join(self.table[: self.used]))
        for token_id, name in sorted(self.names.items()):
            digest.update(f"\n{token_id} {len(name)} {name}".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def same_as(self, other: Vocabulary) -> bool:
        """Whether both tables give every id the same bytes or the same name. Padding rows do not count."""
        return self is other or self.content_hash == other.content_hash

    def explain_difference(self, other: Vocabulary) -> str:
        """What differs between the tables, in one sentence; "" when they are the same."""
        if self.same_as(other):
            return ""
        common = min(self.used, other.used)
        differing = [i for i in range(common) if self._row(i) != other._row(i)]
        sizes = f"{self.used:,} ids here and {other.used:,} there"
        if not differing:
            return f"The first {common:,} ids are the same, but there are {sizes}."
        first = differing[0]
        return (
            f"{len(differing):,} of the first {common:,} ids differ ({sizes}), the first of them id {first}: "
            f"{self.display(first)!r} here, {other.display(first)!r} there."
        )

    def padding_note(self, other: Vocabulary) -> str:
        """One sentence for equal tables in embeddings of unequal size; "" otherwise."""
        if not self.same_as(other) or len(self) == len(other):
            return ""
        return (
            f"The vocabularies are the same {self.used:,} ids; {len(self):,} and {len(other):,} are the rows of the "
            "embeddings, and the difference is padding that no token uses."
        )

    def shared(self, other: Vocabulary) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The ids with equal bytes on both sides: (ids here [K], ids there [K]), ascending in the ids here.

        Left out are control ids, ids of zero bytes, and bytes that two ids of one vocabulary share: which of the two is
        meant cannot be known.
        """
        there = other._unambiguous
        pairs = [(here, there[data]) for data, here in self._unambiguous.items() if data in there]
        found = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        found = found[np.argsort(found[:, 0])]
        return found[:, 0].copy(), found[:, 1].copy()

    @cached_property
    def _unambiguous(self) -> dict[bytes, int]:
        """The ids that alone have their bytes."""
        seen: dict[bytes, int] = {}
        for token_id, data in enumerate(self.table):
            seen[data] = -1 if data in seen else token_id
        seen.pop(b"", None)
        return {data: token_id for data, token_id in seen.items() if token_id >= 0}

    def _row(self, token_id: int) -> bytes | str | None:
        """What identifies a row: bytes, the name of a control token, None for padding."""
        return self.names.get(token_id) if self.control[token_id] else self.table[token_id]


def _check_size(vocabulary: Vocabulary, source: TokenSource) -> None:
    limit = vocabulary.num_embeddings
    if limit is None:
        return
    beyond = [token_id for token_id in {*source.pieces, *source.required} if token_id >= limit]
    if beyond:
        raise VocabularyError(
            f"The tokenizer uses ids up to {max(beyond)}, but the model has only {limit} embedding rows (first id too "
            f"large: {min(beyond)}, {vocabulary.display(min(beyond))!r}). Model and tokenizer do not belong together: load "
            "both from one place, or resize the model's embeddings."
        )


def _check_spelling(vocabulary: Vocabulary, source: TokenSource) -> None:
    """Encode probes and spell them back, so that a table that was misread is an error here and not a loss later."""
    for probe, ids in zip(PROBES, source.encode(PROBES), strict=True):
        spelt = _squeeze(vocabulary.bytes_of([token_id for token_id in ids if token_id < len(vocabulary)]))
        if not any(_is_subsequence(spelt, _squeeze(form.encode())) for form in _forms(probe)):
            raise VocabularyError(
                f"This tokenizer was read as {vocabulary.kind}, but it encodes {probe!r} to {list(ids)}, which that "
                f"reading spells {vocabulary.bytes_of(ids)!r}: the bytes of its tokens cannot be known. Please check that "
                "its decoder fits its pre-tokenizer."
            )


# Words, runs of spaces, accents, characters of two to four bytes, code. All are unchanged by NFC and NFKC.
PROBES = ("Hello world", "two  spaces, one\nline", "caf\u00e9 \u4e2d\u6587 \u0444 \U0001f642", "f(x)=[1,20];")


def _forms(text: str) -> Iterable[str]:
    """The text as a normaliser may change it: case and accents."""
    plain = text.replace("\u00e9", "e")
    return text, text.lower(), text.upper(), plain, plain.lower(), plain.upper()


def _squeeze(data: bytes) -> bytes:
    """Without whitespace, which normalisers and pre-tokenizers add and drop."""
    return data.translate(None, b" \t\r\n")


def _is_subsequence(short: bytes, whole: bytes) -> bool:
    """Whether `short` is `whole` with some bytes left out: those that the vocabulary cannot write."""
    rest = iter(whole)
    return all(byte in rest for byte in short)
