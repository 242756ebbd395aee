"""From a token's string to its bytes: a tokenizer's own decoder, read as a definition and applied to one token.

A `tokenizers` tokenizer is described by its JSON. Its decoder turns a list of token strings into text; what it does to a
token in the middle of a text is that token's bytes. Steps that act only on the edges of a text (the removal of a dummy
prefix, say) therefore do nothing here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from diglot.errors import VocabularyError

Spec = Mapping[str, Any]
Step = Callable[[str], "str | bytes"]

SUPPORTED = "byte-level, metaspace (SentencePiece BPE and Unigram), WordPiece and end-of-word-suffix tokenizers"

# How the WordPiece and CTC decoders of `tokenizers` tidy a token that has its leading space.
_CLEANUP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
    (" 'm", "'m"), (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def parts(component: Spec | None) -> Iterator[Spec]:
    """The single steps of a normaliser, pre-tokenizer or decoder, with every `Sequence` opened."""
    if component is None:
        return
    if component["type"] != "Sequence":
        yield component
        return
    for key in ("normalizers", "pretokenizers", "decoders"):
        for child in component.get(key, ()):
            yield from parts(child)


def byte_alphabet() -> dict[str, int]:
    """The 256 printable characters that stand for the byte values in byte-level BPE (GPT-2, Radford et al. 2019).

    Printable Latin-1 characters stand for themselves; the other 68 values take the characters from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [value for value in range(256) if value not in set(printable)]
    alphabet = {chr(value): value for value in printable}
    alphabet.update({chr(0x100 + rank): value for rank, value in enumerate(rest)})
    return alphabet


@dataclass(frozen=True)
class Spelling:
    """How one tokenizer writes bytes.

    kind: "byte-level", "metaspace", "wordpiece", "suffix" or "plain".
    steps: applied in order to a token's string, until one gives bytes.
    first_drops_space: the first token of a text is written without its leading space.
    last_drops_space: the last token of a text is written without its trailing space.
    """

    kind: str
    steps: tuple[Step, ...]
    first_drops_space: bool = False
    last_drops_space: bool = False

    def __call__(self, token: str) -> bytes:
        """The bytes of one token string of the model's own vocabulary."""
        value: str | bytes = token
        for step in self.steps:
            value = step(value)
            if isinstance(value, bytes):
                return value
        return value.encode("utf-8", "surrogatepass")


def spelling_of(spec: Spec) -> Spelling:
    """The spelling of a `tokenizers` tokenizer from its parsed JSON.

    Raises:
        VocabularyError: the tokenizer has no decoder that says which bytes its tokens stand for, or one of a kind whose
            effect on a single token is not defined.
    """
    steps: list[Step] = []
    kinds: list[str] = []
    if _has_byte_fallback(spec):
        steps.append(byte_piece)
    for decoder in _decoders(spec):
        kind, step = _READERS.get(decoder["type"], _unsupported)(decoder)
        kinds.append(kind)
        if step is not None:
            steps.append(step)
    kind = next((kind for kind in ("byte-level", "metaspace", "wordpiece", "suffix") if kind in kinds), "plain")
    spaced_by_words = kind == "metaspace" and keeps_word_prefix(spec)
    return Spelling(
        kind,
        tuple(steps),
        first_drops_space=kind == "wordpiece" or spaced_by_words,
        last_drops_space=kind == "suffix",
    )


def keeps_word_prefix(spec: Spec) -> bool:
    """Whether words are split at whitespace before each is given its own prefix (T5 and XLM-R as first converted)."""
    seen_split = False
    for step in parts(spec.get("pre_tokenizer")):
        if step["type"] == "Metaspace":
            return seen_split and step.get("prepend_scheme", "always") == "always"
        seen_split = seen_split or step["type"] in ("WhitespaceSplit", "Whitespace", "BertPreTokenizer")
    return False


def byte_piece(token: str) -> str | bytes:
    """`<0xNN>` is the byte NN; anything else stays as it is."""
    found = _BYTE_PIECE.fullmatch(token)
    return bytes([int(found[1], 16)]) if found else token


def _has_byte_fallback(spec: Spec) -> bool:
    named = any(decoder["type"] == "ByteFallback" for decoder in parts(spec.get("decoder")))
    return named or bool(spec["model"].get("byte_fallback"))


def _decoders(spec: Spec) -> list[Spec]:
    """The decoder's steps; where there is no decoder, the ones that undo the pre-tokenizer or the normaliser."""
    found = list(parts(spec.get("decoder")))
    if found:
        return found
    for step in [*parts(spec.get("pre_tokenizer")), *parts(spec.get("normalizer"))]:
        if step["type"] in ("ByteLevel", "Metaspace"):
            return [step]
        if step["type"] == "Replace" and step["pattern"] == {"String": " "}:
            return [{"type": "Replace", "pattern": {"String": step["content"]}, "content": " "}]
    model = spec["model"]
    if model["type"] == "WordPiece":
        return [{"type": "WordPiece", "prefix": model["continuing_subword_prefix"], "cleanup": False}]
    if model["type"] == "BPE" and model.get("end_of_word_suffix"):
        return [{"type": "BPEDecoder", "suffix": model["end_of_word_suffix"]}]
    raise VocabularyError(
        f"This tokenizer is a {model['type']} model without a decoder, so nothing says which bytes its tokens stand for. "
        f"Supported are {SUPPORTED}: set `tokenizer.backend_tokenizer.decoder`."
    )


def _byte_level(decoder: Spec) -> tuple[str, Step]:
    alphabet = byte_alphabet()

    def step(token: str) -> bytes:
        try:
            return bytes([alphabet[char] for char in token])
        except KeyError:  # the decoder leaves a token that is not wholly in the alphabet as it is
            return token.encode("utf-8", "surrogatepass")

    return "byte-level", step


def _metaspace(decoder: Spec) -> tuple[str, Step]:
    mark = decoder["replacement"]
    return "metaspace", lambda token: token.replace(mark, " ")


def _replace(decoder: Spec) -> tuple[str, Step]:
    old, new = decoder["pattern"].get("String"), decoder["content"]
    if old is None:
        raise VocabularyError(
            f"This tokenizer's decoder replaces by the regular expression {decoder['pattern']}, which has no defined "
            f"effect on one token. Supported are {SUPPORTED}."
        )
    return "metaspace" if new == " " else "plain", lambda token: token.replace(old, new)


def _word_piece(decoder: Spec) -> tuple[str, Step]:
    prefix, cleanup = decoder["prefix"], decoder["cleanup"]

    def step(token: str) -> str:
        token = token[len(prefix) :] if token.startswith(prefix) else " " + token
        for old, new in _CLEANUP if cleanup else ():
            token = token.replace(old, new)
        return token

    return "wordpiece", step


def _suffix(decoder: Spec) -> tuple[str, Step]:
    suffix = decoder["suffix"]
    return "suffix", lambda token: token.replace(suffix, " ")


def _strip(decoder: Spec) -> tuple[str, Step | None]:
    """`Strip` after `Fuse` acts on the edge of a text; `_READERS` sees no order, so only that use is read."""
    return "plain", None


def _nothing(decoder: Spec) -> tuple[str, Step | None]:
    return "plain", None


def _unsupported(decoder: Spec) -> tuple[str, Step | None]:
    raise VocabularyError(
        f"This tokenizer decodes with {decoder['type']!r}, so the bytes of its tokens cannot be known one by one. "
        f"Supported are {SUPPORTED}."
    )


_READERS: dict[str, Callable[[Spec], tuple[str, Step | None]]] = {
    "ByteLevel": _byte_level,
    "Metaspace": _metaspace,
    "Replace": _replace,
    "WordPiece": _word_piece,
    "BPEDecoder": _suffix,
    "ByteFallback": _nothing,
    "Fuse": _nothing,
    "Strip": _strip,
}
