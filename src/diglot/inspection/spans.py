"""Two tokenisations of one text, cut where both have a boundary: what `diglot align` and pages show."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diglot.alignment import Side, align
from diglot.arrays import Ints
from diglot.vocabulary import ByteEncoder, Encoded, Vocabulary


@dataclass(frozen=True)
class Span:
    """One chunk: the tokens of both sides that cover the same bytes. `end` of the last one that is cut off is -1."""

    start: int  # byte
    end: int
    student: tuple[bytes, ...]
    teacher: tuple[bytes, ...]
    exact: bool  # can it be compared?

    @property
    def one_to_one(self) -> bool:
        """One token on either side, exactly the text."""
        return self.exact and len(self.student) == len(self.teacher) == 1


def align_text(student: ByteEncoder, teacher: ByteEncoder, text: str) -> list[Span]:
    """`text` as both sides continue some other text with it, in chunks.

    Raises `VocabularyError` for text with a lone surrogate.
    """
    (of_s,), (of_t,) = student.encode([text]), teacher.encode([text])
    return spans_of(of_s, of_t, student.vocabulary, teacher.vocabulary, text.encode())


def spans_of(
    student: Encoded, teacher: Encoded, vocabulary_s: Vocabulary, vocabulary_t: Vocabulary, text: bytes
) -> list[Span]:
    """Chunks of two encodings of `text`, in order. Tokens in no chunk make one last span that is not exact."""
    alignment = align(_side(student), _side(teacher), 1)
    pieces_s, pieces_t = _pieces(student, vocabulary_s, text), _pieces(teacher, vocabulary_t, text)
    spans: list[Span] = []
    start = 0
    for chunk in range(alignment.num_chunks):
        mine, theirs = np.flatnonzero(alignment.chunk_s == chunk), np.flatnonzero(alignment.chunk_t == chunk)
        end = int(student.ends[mine[-1]])
        spans.append(
            Span(
                start, end, tuple(pieces_s[i] for i in mine), tuple(pieces_t[i] for i in theirs),
                bool(alignment.chunk_exact[chunk]),
            )
        )  # fmt: skip
        start = end
    left_s, left_t = np.flatnonzero(alignment.chunk_s < 0), np.flatnonzero(alignment.chunk_t < 0)
    if len(left_s) or len(left_t):
        left = tuple(pieces_s[i] for i in left_s), tuple(pieces_t[i] for i in left_t)
        spans.append(Span(start, -1, *left, exact=False))
    return spans


def _side(encoded: Encoded) -> Side:
    n = len(encoded.ids)
    return Side(encoded.ends, np.zeros(n, np.int64), encoded.exact, np.zeros(n, np.bool_))


def _pieces(encoded: Encoded, vocabulary: Vocabulary, text: bytes) -> list[bytes]:
    """The bytes of the text that each token covers; where it is not exact, what the token itself would write."""
    starts: Ints = np.concatenate([[0], encoded.ends[:-1]]) if len(encoded.ends) else encoded.ends
    return [
        text[low:high] if exact else (vocabulary.token(i) or vocabulary.display(i).encode())
        for i, low, high, exact in zip(
            encoded.ids.tolist(), starts.tolist(), encoded.ends.tolist(), encoded.exact.tolist(), strict=True
        )
    ]
