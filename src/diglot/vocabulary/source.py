"""What a table is made of, read from a tokenizer: the bytes of ids, the names of control ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diglot.errors import VocabularyError
from diglot.vocabulary.kinds import SUPPORTED, Spec, spelling_of


@dataclass(frozen=True)
class TokenSource:
    """The tokens of one tokenizer.

    pieces: id -> bytes. names: control id -> name. required: ids of bos, eos and pad that exist.
    encode: texts -> ids as the tokenizer itself writes them, nothing added around them.
    """

    kind: str
    pieces: Mapping[int, bytes]
    names: Mapping[int, str]
    required: frozenset[int]
    encode: Callable[[Sequence[str]], list[list[int]]]
    first_drops_space: bool = False
    last_drops_space: bool = False

    def ids(self) -> Iterator[int]:
        yield from self.pieces
        yield from self.names


def read_source(tokenizer: Any) -> TokenSource:
    """The tokens of a `transformers` tokenizer.

    Raises:
        VocabularyError: a tokenizer of a kind whose token bytes cannot be known.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return _from_backend(tokenizer, backend)
    if hasattr(tokenizer, "sp_model"):
        from diglot.vocabulary.slow import sentencepiece_source

        return sentencepiece_source(tokenizer)
    hint = " Pass `processor.tokenizer`." if hasattr(tokenizer, "tokenizer") else ""
    raise VocabularyError(
        f"{type(tokenizer).__name__} has neither a `tokenizers` backend nor a SentencePiece model, so the bytes of its "
        f"tokens cannot be known. Supported are {SUPPORTED}.{hint}"
    )


def parse_backend(backend: Any) -> dict[str, Any]:
    """The JSON of a `tokenizers.Tokenizer`, parsed."""
    return json.loads(backend.to_str())


def model_tokens(spec: Spec) -> dict[str, int]:
    """Token string -> id of the model's own vocabulary, without added tokens."""
    vocab = spec["model"]["vocab"]
    if isinstance(vocab, Mapping):
        return dict(vocab)
    return {piece: token_id for token_id, (piece, _) in enumerate(vocab)}


def control_names(spec: Spec, special_ids: Sequence[int]) -> dict[int, str]:
    """The control tokens of a parsed tokenizer: special added tokens, those the tokenizer calls special, and unk."""
    special = set(special_ids)
    names = {
        token["id"]: token["content"] for token in spec["added_tokens"] if token["special"] or token["id"] in special
    }
    model = spec["model"]
    if isinstance(model["vocab"], Mapping):
        by_id = {token_id: piece for piece, token_id in model["vocab"].items() if token_id in special}
        names = {**by_id, **names}
        unk = model.get("unk_token")
        if unk in model["vocab"]:
            names[model["vocab"][unk]] = unk
    else:
        names = {**{i: model["vocab"][i][0] for i in special if i < len(model["vocab"])}, **names}
        if model.get("unk_id") is not None:
            names[model["unk_id"]] = model["vocab"][model["unk_id"]][0]
    return names


def required_ids(tokenizer: Any) -> frozenset[int]:
    """The ids of bos, eos and pad, where the tokenizer has them."""
    found = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id"))
    return frozenset(token_id for token_id in found if isinstance(token_id, int))


def _from_backend(tokenizer: Any, backend: Any) -> TokenSource:
    spec = parse_backend(backend)
    spelling = spelling_of(spec)
    names = control_names(spec, tokenizer.all_special_ids)
    tokens = model_tokens(spec)
    pieces = {token_id: spelling(piece) for piece, token_id in tokens.items() if token_id not in names}
    for token in spec["added_tokens"]:
        # An added token that the model also has ("▁▁" of SentencePiece) is mostly written by the model: its spelling holds.
        if token["id"] not in names and token["id"] not in pieces:
            pieces[token["id"]] = token["content"].encode("utf-8", "surrogatepass")
    return TokenSource(
        kind=spelling.kind,
        pieces=pieces,
        names=names,
        required=required_ids(tokenizer),
        encode=lambda texts: _encode_as_is(backend, texts),
        first_drops_space=spelling.first_drops_space,
        last_drops_space=spelling.last_drops_space,
    )


def _encode_as_is(backend: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids that the user's own backend gives, less any padding that it was last told to add."""
    encodings = backend.encode_batch(list(texts), add_special_tokens=False)
    return [
        [token_id for token_id, kept in zip(encoding.ids, encoding.attention_mask, strict=True) if kept]
        for encoding in encodings
    ]
