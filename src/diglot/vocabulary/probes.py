"""A few texts that every tokenizer must spell back, so that a misread table is an error and not a wrong loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from diglot.errors import VocabularyError
from diglot.vocabulary.table import Vocabulary

# Words, runs of spaces, an accent, characters of two to four bytes, code. All are unchanged by NFC and NFKC.
PROBES = ("Hello world", "two  spaces, one\nline", "caf\u00e9 \u4e2d\u6587 \u0444 \U0001f642", "f(x)=[1,20];")


def check_spelling(vocabulary: Vocabulary, encoded: Iterable[Sequence[int]]) -> None:
    """Compare what the ids of `PROBES` spell with the probes.

    A tokenizer may leave out what it cannot write, change case, drop accents, add and drop whitespace; not more.

    Raises:
        VocabularyError: the ids spell something else.
    """
    for probe, ids in zip(PROBES, encoded, strict=True):
        spelt = _squeeze(vocabulary.bytes_of(ids))
        if not any(_is_subsequence(spelt, _squeeze(form.encode())) for form in _forms(probe)):
            raise VocabularyError(
                f"This tokenizer was taken for {vocabulary.kind}, but its tokens of {probe!r} then "
                f"spell {vocabulary.bytes_of(ids)!r}. Its decoder does not undo its pre-tokenizer, or its kind is "
                "not supported: set `tokenizer.backend_tokenizer.decoder`, or use another tokenizer."
            )


def _forms(text: str) -> Iterable[str]:
    plain = text.replace("\u00e9", "e")
    return text, text.lower(), text.upper(), plain, plain.lower(), plain.upper()


def _squeeze(data: bytes) -> bytes:
    return data.translate(None, b" \t\r\n")


def _is_subsequence(short: bytes, whole: bytes) -> bool:
    rest = iter(whole)
    return all(byte in rest for byte in short)
