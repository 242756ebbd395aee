"""Tokenizers, and what else is known of a model without its weights, by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from diglot.errors import ConfigError, DiglotError
from diglot.vocabulary import load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Input:
    """What is known of a model without its weights."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    num_embeddings: int | None = None
    generation_config: GenerationConfig | None = None


def load_input(name: str, role: str, arguments: Mapping[str, Any] | None = None) -> Input:
    """The tokenizer of a model id or folder, and its configuration if there is one: a tokenizer alone will do.

    `arguments` are for `load_tokenizer`. Raises `ConfigError` if there is no tokenizer.
    """
    try:
        tokenizer = load_tokenizer(name, arguments)
    except DiglotError:
        raise
    except Exception as error:  # whatever the library raises for what is no tokenizer
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"No tokenizer of the {role} could be loaded from {name!r}: {first}") from error
    config = _or_none(AutoConfig, name)
    rows = getattr(config.get_text_config(), "vocab_size", None) if config is not None else None
    return Input(name, tokenizer, rows, _or_none(GenerationConfig, name))


def _or_none(cls: Any, name: str) -> Any:
    """What `cls` finds at `name`. A folder of a tokenizer has neither, and it does not matter why."""
    try:
        return cls.from_pretrained(name)
    except Exception as error:
        logger.debug("%s has no %s: %s", name, cls.__name__, error)
        return None
