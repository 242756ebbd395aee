"""A tokenizer by name, loaded so that the bytes of its tokens can be read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from diglot.errors import ConfigError
from diglot.vocabulary.kinds import byte_alphabet
from diglot.vocabulary.own_file import differences_from_file

logger = logging.getLogger(__name__)

# What these control tokens of every tekken.json are for, which the file itself does not say.
_TEKKEN_ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_TEXTS = ("def f(n): return 12", "na\u00efve \u6570\u5b66 \U0001f642", "\t  a\r\nb ")


def load_tokenizer(place: str, arguments: Mapping[str, Any] | None = None, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model id or folder.

    Where the library picks one that is not backed by `tokenizers` (Mistral's own beside vLLM, a Python class), and the
    place has what one that is can be made of, it is that. Where it rebuilds tokenizer.json for a declared class so that
    text is lost (5.4 does, of DeepSeek V3), the file is read as it is, with a warning. One made of
    tekken.json alone gets the roles of its control tokens that nothing else names; it has no chat template.

    Args:
        arguments: for `from_pretrained`. `tokenizer_class` among them names a class of transformers: with
            "TokenizersBackend" tokenizer.json is read as it is, whatever tokenizer_config.json declares.
            `chat_template` is a template, or a file that holds one.
        options: the same, which `arguments` override.

    Raises:
        ConfigError: there is no such class, or no such file of a template.
    """
    chosen = {**options, **(arguments or {})}
    template = _template(chosen.pop("chat_template", None))
    loader: Any = AutoTokenizer
    if (name := chosen.pop("tokenizer_class", None)) is not None:
        loader = getattr(transformers, str(name), None)
        if not hasattr(loader, "from_pretrained"):
            raise ConfigError(f"tokenizer_class={name!r}: transformers has no such class of tokenizers.")
    tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(place, **chosen)
    if name is None:
        tokenizer = _readable(tokenizer, place, chosen)
    if template is not None:  # set here, since a file beside the tokenizer would come before the argument
        tokenizer.chat_template = template
    if Path(getattr(tokenizer, "vocab_file", None) or "").name == "tekken.json":
        for role, token in _TEKKEN_ROLES.items():
            if getattr(tokenizer, role, None) is None and tokenizer.convert_tokens_to_ids(token) is not None:
                setattr(tokenizer, role, token)
    return tokenizer


def _template(value: Any) -> Any:
    """A chat template: as it is, or the text of the file that is named."""
    if not isinstance(value, str) or "{" in value:
        return value
    try:
        return Path(value).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"chat_template is {value!r:.80}, expected the text of a template, which has {{{{ in it, or the name of a "
            f"file that holds one (looked from {Path.cwd()}): {error}."
        ) from error


def _readable(tokenizer: PreTrainedTokenizerBase, place: str, options: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer that the library picked, or another one of the same place whose bytes can be read."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        if (of_bytes := of_single_bytes(tokenizer)) is not None:
            return of_bytes
        with suppress(Exception):  # whatever the library raises where there is nothing to make it of
            return _as_written(place, options)
    lost = next((one for one in differences_from_file(tokenizer) if one.lost), None)
    if lost is not None:
        logger.warning(
            "%s: transformers %s rebuilds this tokenizer as %s, which loses text: of %r it keeps %r. Its "
            "tokenizer.json is read as it is instead.",
            *(place, transformers.__version__, type(tokenizer).__name__, lost.text),
            tokenizer.decode(list(lost.loaded_ids)),
        )
        return _as_written(place, options)
    return tokenizer


def _as_written(place: str, options: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer.json of a place, not rebuilt."""
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(place, **options)
    return tokenizer


def of_single_bytes(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast | None:
    """The same on the `tokenizers` library, of one whose text tokens are the 256 bytes (ByT5's), else None."""
    if any(len(tokenizer.encode(text, add_special_tokens=False)) != len(text.encode()) for text in _TEXTS):
        return None  # before it is asked for tokens that it may not have, which some classes warn of one by one
    ids: list[Any] = [tokenizer.convert_tokens_to_ids(chr(byte)) for byte in range(256)]
    if len(set(ids)) < 256 or not all(
        tokenizer.encode(text, add_special_tokens=False) == [ids[byte] for byte in text.encode()] for text in _TEXTS
    ):
        return None
    named = sorted(tokenizer.added_tokens_decoder.items())
    pieces = {character: ids[byte] for character, byte in byte_alphabet().items()}
    backend = Tokenizer(models.BPE({**pieces, **{str(token): i for i, token in named}}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([token for _, token in named])
    added = tokenizer.build_inputs_with_special_tokens([])
    if added:
        ends = [(tokenizer.convert_ids_to_tokens(i), i) for i in added]
        backend.post_processor = processors.TemplateProcessing(
            single=["$A", *(token for token, _ in ends)], special_tokens=ends
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=tokenizer.model_max_length, **tokenizer.special_tokens_map
    )
    made.chat_template = getattr(tokenizer, "chat_template", None)
    return made
