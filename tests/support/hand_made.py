"""Vocabularies written down in a test, and a tokenizer that follows a list of spellings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from diglot.vocabulary import Speller, Vocabulary


def vocabulary(*entries: bytes | str) -> Vocabulary:
    """Bytes are tokens of text, strings are names of control tokens, an empty string is a padding row."""
    texts = [entry if isinstance(entry, bytes) else b"" for entry in entries]
    return Vocabulary(
        kind="byte-level",
        data=np.frombuffer(b"".join(texts), dtype=np.uint8),
        offsets=np.cumsum([0, *map(len, texts)]),
        control=np.array([isinstance(entry, str) for entry in entries]),
        names={i: entry for i, entry in enumerate(entries) if isinstance(entry, str) and entry},
    )


def renumbered(vocab: Vocabulary, order: Sequence[int]) -> Vocabulary:
    """The same tokens; what was `order[i]` is now `i`."""
    return vocabulary(*(vocab.names.get(i, "") if vocab.control[i] else vocab.token(i) for i in order))


def speller(vocab: Vocabulary, spellings: Mapping[str, Sequence[bytes]] | None = None) -> Speller:
    """Spells a text as listed, else as one token if there is one, else byte by byte; None for what it has no token."""
    id_of = {vocab.token(i): i for i in reversed(range(len(vocab))) if not vocab.control[i]}

    def spell(texts: Sequence[bytes]) -> list[list[int] | None]:
        results = list[list[int] | None]()
        for raw in texts:
            listed = (spellings or {}).get(raw.decode("utf-8", "replace"))
            pieces = listed or ([raw] if raw in id_of else [bytes([b]) for b in raw])
            ids = [id_of[piece] for piece in pieces if piece in id_of]
            results.append(ids if b"".join(map(vocab.token, ids)) == raw else None)
        return results

    return spell
