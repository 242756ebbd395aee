"""Does a loaded tokenizer cut text as the tokenizer.json that it was loaded from says?

Transformers builds normalizer and pre-tokenizer of some classes anew, from the class that tokenizer_config.json
declares; what the file says is then not read. A model that was trained with the file then sees other tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

# Where pre-tokenizers differ: spaces, digits, contractions, line breaks, code, accents, other scripts.
TEXTS = (
    "Hello world",
    " leading, two  spaces and three   more ",
    "12345 + 678 = 13023, 3.14",
    "don't you'll I'LL we've",
    "lines\n\n\nand\r\n\ttabs \n",
    "def f(n):\n    if n < 2:\n        return [n_1]  # camelCase HTTPServer",
    "na\u00efve caf\u00e9 e\u0301 \u00c5",
    "\u6570\u5b66 \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0440\u0443\u0441\u0441\u043a\u0438\u0439 "
    "\u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947 \U0001f642",
)


class Difference(NamedTuple):
    """A text that is cut in another way, as token ids of the file and of the loaded tokenizer."""

    path: str
    text: str
    file_ids: tuple[int, ...]
    loaded_ids: tuple[int, ...]
    lost: bool  # decoding gives the text back by the file, and does not as loaded


def difference_from_file(tokenizer: PreTrainedTokenizerBase) -> Difference | None:
    """The first of `differences_from_file`, or None."""
    return next(differences_from_file(tokenizer), None)


def differences_from_file(tokenizer: PreTrainedTokenizerBase) -> Iterator[Difference]:
    """Compare `tokenizer` with its tokenizer.json on `TEXTS`.

    None are found where there is nothing to compare with: made in memory, loaded from elsewhere, or with BPE dropout.
    Nothing is downloaded.
    """
    backend, path = getattr(tokenizer, "backend_tokenizer", None), _file_of(tokenizer)
    if backend is None or path is None or getattr(backend.model, "dropout", None):
        return
    stated = _by_file(str(path), path.stat().st_mtime_ns)
    if not stated:
        return
    for text, (ids, round_trips) in zip(TEXTS, stated, strict=True):
        loaded = _ids_of(backend, text)
        if loaded != ids:
            yield Difference(str(path), text, ids, loaded, round_trips and backend.decode(loaded) != text)


def describe_difference(difference: Difference, name: str) -> str:
    """A message for people: which side, which text, both encodings, and what to do."""
    return (
        f"{name}: the loaded tokenizer does not cut text as its own {difference.path} does: {difference.text!r} is "
        f"{list(difference.file_ids)} by the file and {list(difference.loaded_ids)} as loaded. Transformers rebuilt it "
        "for the tokenizer_class that tokenizer_config.json declares, or it was changed after loading. If the model "
        'was trained with the file, write "tokenizer_class": "TokenizersBackend" there, or pass '
        "PreTrainedTokenizerFast.from_pretrained(...), which reads the file as it is. In a run the same is "
        "tokenizer_kwargs (teacher_tokenizer_kwargs): {tokenizer_class: TokenizersBackend}."
    )


def _file_of(tokenizer: PreTrainedTokenizerBase) -> Path | None:
    """The tokenizer.json of the folder or, from the local cache alone, of the hub name that a tokenizer came from."""
    place = getattr(tokenizer, "name_or_path", "")
    if not place:
        return None
    path = Path(place) / "tokenizer.json"
    if path.is_file():
        return path
    if Path(place).exists():
        return None
    try:
        cached = cached_file(place, "tokenizer.json", local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(cached) if cached else None


def _ids_of(backend: Tokenizer, text: str) -> tuple[int, ...]:
    """No ids where it refuses the text: one rebuilt with a byte fallback or an unknown token that it does not have."""
    try:
        return _ids(backend.encode(text, add_special_tokens=False))
    except Exception:  # the library raises nothing narrower
        return ()


@lru_cache(maxsize=64)
def _by_file(path: str, _written: int) -> tuple[tuple[tuple[int, ...], bool], ...]:
    """Of each text, its ids as the file says, and whether these decode to it; none where the file has a BPE dropout or
    is none that can be read."""
    try:
        stated = Tokenizer.from_file(path)
    except Exception:  # the library raises nothing narrower; transformers has read the tokenizer from something else
        return ()
    if getattr(stated.model, "dropout", None):
        return ()
    stated.no_truncation()
    ids = [_ids(stated.encode(text, add_special_tokens=False)) for text in TEXTS]
    return tuple((one, stated.decode(one) == text) for one, text in zip(ids, TEXTS, strict=True))


def _ids(encoding: Encoding) -> tuple[int, ...]:
    """Without padding."""
    return tuple(i for i, real in zip(encoding.ids, encoding.attention_mask, strict=True) if real)
