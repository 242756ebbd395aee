"""Which bytes each token id of a tokenizer stands for, read from the tokenizer's own description.

Three questions decide: how does its model spell a piece (byte alphabet, `▁` for a space, `##`, `</w>`), which ids
are added tokens (spelt as they are), and which are special (no bytes at all).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase

from diglot.errors import VocabularyError

Spell = Callable[[str], bytes]

_MARKER = re.compile("^[<\\[{|\uff5c].*[>\\]}|\uff5c]$", re.S)
_BYTE_PIECE = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")


def byte_alphabet() -> dict[str, int]:
    """GPT-2's byte alphabet: the printable character that stands for each byte value in byte-level pieces."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}


@dataclass(frozen=True)
class Description:
    """A tokenizer's parts that matter for bytes."""

    kind: str
    pieces: dict[int, str]  # id -> piece of the model
    added: dict[int, str]  # id -> content of a non-special added token
    special: dict[int, str]  # id -> name
    spell: Spell  # bytes of a model piece
    leading_space: bool  # the first token of a text is written without its leading space
    trailing_space: bool  # the last token of a text is written without its trailing space


def describe(tokenizer: PreTrainedTokenizerBase) -> Description:
    """Read `tokenizer`. Raises `VocabularyError` when its kind does not say which bytes a piece stands for."""
    backend = getattr(tokenizer, "backend_tokenizer", None) or getattr(tokenizer, "_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        raise VocabularyError(
            f"{type(tokenizer).__name__} is not backed by the `tokenizers` library, so the bytes of its tokens cannot "
            "be read. Give its name or folder, of which diglot.vocabulary.load_tokenizer makes one that is where it "
            "can, or convert it to a tokenizer.json."
        )
    special_ids = set(tokenizer.all_special_ids)
    tokens = backend.get_added_tokens_decoder()
    pieces = {i: piece for piece, i in backend.get_vocab(with_added_tokens=False).items()}
    model = _model_options(backend)
    declared = {i for i, token in tokens.items() if token.special}
    if isinstance(backend.model, models.BPE):  # loading declares every role; a pad may be a letter all the same
        declared -= special_ids - {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    ordinary = {i for i in special_ids - declared if i in pieces and _is_ordinary(pieces[i], backend.model)}
    special = {i: t.content for i, t in tokens.items() if (t.special or i in special_ids) and i not in ordinary}
    added = {i: t.content for i, t in tokens.items() if i not in special}
    for i, piece in pieces.items():
        if (i in special_ids and i not in ordinary) or piece == model.get("unk_token") or i == model.get("unk_id"):
            special.setdefault(i, piece)
    # What the model has too (Gemma's runs of ▁) is mostly written by the model, so there the model's spelling holds.
    added = {i: content for i, content in added.items() if i not in pieces}
    kind, spell, leading = _speller(backend)
    return Description(kind, pieces, added, special, spell, leading, kind == "suffix")


def _model_options(backend: Tokenizer) -> dict[str, Any]:
    """The options of a tokenizer's model that matter for bytes. Those of a Unigram stand in its description alone."""
    if isinstance(backend.model, models.Unigram):
        return {key: value for key, value in json.loads(backend.model.__getstate__()).items() if key != "vocab"}
    return {key: getattr(backend.model, key, None) for key in ("unk_token", "byte_fallback", "end_of_word_suffix")}


def _is_ordinary(piece: str, model: Any) -> bool:
    """Is a piece that was declared special (a pad, say) one that stands for text all the same, as "!" does?

    A marker looks like one, and a BPE does not merge it from text.
    """
    if _MARKER.match(piece) and not _BYTE_PIECE.match(piece):
        return False
    return not isinstance(model, models.BPE) or [token.value for token in model.tokenize(piece)] == [piece]


def keeps_word_prefix(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Are words split at whitespace before each gets its own ▁ (as T5 was first converted)? Then ▁ is no dummy."""
    types = [p["type"] for p in _parts(pre_tokenizer) if p.get("prepend_scheme", "always") == "always"]
    if "Metaspace" not in types:
        return False
    return any(kind in ("WhitespaceSplit", "Whitespace") for kind in types[: types.index("Metaspace")])


def component(part: Any) -> dict[str, Any] | None:
    """The description of a normaliser, pre-tokenizer or decoder, as in tokenizer.json."""
    return None if part is None else json.loads(part.__getstate__())


def _parts(component: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A component and, for a sequence, all that is in it."""
    if component is None:
        return
    yield component
    for key in ("decoders", "pretokenizers", "normalizers"):
        for part in component.get(key) or []:
            yield from _parts(part)


def _speller(backend: Tokenizer) -> tuple[str, Spell, bool]:
    decoders = list(_parts(component(backend.decoder))) or _undoing(backend)
    types = {d["type"] for d in decoders} | {p["type"] for p in _parts(component(backend.pre_tokenizer))}
    decoder_types = {d["type"] for d in decoders}
    options = _model_options(backend)
    if "ByteLevel" in types and options.get("end_of_word_suffix"):
        return "suffix", _byte_level_suffix_speller(options["end_of_word_suffix"]), False
    if "ByteLevel" in types:
        return "byte-level", _spell_byte_level, False
    if "WordPiece" in decoder_types:
        (decoder,) = (d for d in decoders if d["type"] == "WordPiece")
        return "wordpiece", _wordpiece_speller(decoder["prefix"], decoder["cleanup"]), True
    if "BPEDecoder" in decoder_types:
        (decoder,) = (d for d in decoders if d["type"] == "BPEDecoder")
        return "suffix", _suffix_speller(decoder["suffix"]), False
    if isinstance(backend.model, models.WordLevel) and not decoders:
        return "words", lambda piece: (" " + piece).encode(), True
    if decoders and decoder_types <= _LITERAL:
        by_words = keeps_word_prefix(component(backend.pre_tokenizer))
        return "metaspace", _literal_speller(_replacements(decoders), bool(options.get("byte_fallback"))), by_words
    raise VocabularyError(
        f"A tokenizer with model {type(backend.model).__name__} and decoder {sorted(decoder_types) or 'none'} does not "
        "say which bytes its pieces stand for. Supported are byte-level BPE, SentencePiece-style BPE and Unigram "
        "(Metaspace), pieces spelt as they are, WordPiece, WordLevel, and </w> BPE."
    )


def _undoing(backend: Tokenizer) -> list[dict[str, Any]]:
    """For a tokenizer without a decoder: what undoes the ▁ of its pre-tokenizer or normaliser."""
    for part in [*_parts(component(backend.pre_tokenizer)), *_parts(component(backend.normalizer))]:
        if part["type"] == "Metaspace":
            return [part]
        if part["type"] == "Replace" and part["pattern"] == {"String": " "}:
            return [{"type": "Replace", "pattern": {"String": part["content"]}, "content": " "}]
    return []


# Each character of the alphabet -> the one whose code is its byte; the 68 that only look like bytes -> no byte at all.
_AS_BYTE = {**dict.fromkeys(range(256), 0xFFFF), **{ord(c): byte for c, byte in byte_alphabet().items()}}


def _spell_byte_level(piece: str) -> bytes:
    try:
        return piece.translate(_AS_BYTE).encode("latin-1")
    except UnicodeEncodeError:  # the library's decoder leaves a piece that is not wholly in the alphabet as it is
        return piece.encode()


# Decoder steps that say of every piece by itself which bytes it stands for. `Strip` takes the dummy prefix off again.
_LITERAL = {"Sequence", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


def _replacements(decoders: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What a decoder writes in place of what, in its order. A pattern that is no plain string is none of these."""
    replacements = []
    for step in decoders:
        if step["type"] == "Metaspace":
            replacements.append((step["replacement"], " "))
        elif step["type"] == "Replace" and "String" in step["pattern"]:
            replacements.append((step["pattern"]["String"], step["content"]))
    return replacements


def _literal_speller(replacements: list[tuple[str, str]], byte_fallback: bool) -> Spell:
    def spell(piece: str) -> bytes:
        if byte_fallback and piece[:3] == "<0x" and (match := _BYTE_PIECE.match(piece)):
            return bytes([int(match[1], 16)])
        for old, new in replacements:
            piece = piece.replace(old, new)
        return piece.encode()

    return spell


# How the WordPiece decoder of `tokenizers` tidies a piece with its leading space.
_CLEANUP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
    (" 'm", "'m"), (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


def _wordpiece_speller(prefix: str, cleanup: bool) -> Spell:
    def spell(piece: str) -> bytes:
        text = piece[len(prefix) :] if piece.startswith(prefix) else " " + piece
        for old, new in _CLEANUP if cleanup else ():
            text = text.replace(old, new)
        return text.encode()

    return spell


def _suffix_speller(suffix: str) -> Spell:
    return lambda piece: (piece[: -len(suffix)] + " ").encode() if piece.endswith(suffix) else piece.encode()


def _byte_level_suffix_speller(suffix: str) -> Spell:
    """CLIP's: the byte alphabet, with a mark in place of the space behind a word."""
    return lambda piece: (
        _spell_byte_level(piece[: -len(suffix)]) + b" " if piece.endswith(suffix) else _spell_byte_level(piece)
    )
