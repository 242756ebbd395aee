"""Real models and tokenizers for tests marked `real`; `make test-real` fetches them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
from assets import cache
from transformers import PreTrainedTokenizerBase

from diglot.vocabulary import load_tokenizer

TOKENIZERS = (
    "smollm2", "gemma3", "qwen3", "llama3", "deepseek_v3", "llama2", "claude", "gpt35turbo", "gpt4o", "gptoss",
)  # fmt: skip


def _folder(kind: str, name: str) -> Path:
    path = cache() / kind / name
    if not path.exists():
        pytest.fail(f"{kind[:-1]} {name} is not in {cache()}. Run `make test-real`, which fetches it.")
    return path


def model_folder(name: str) -> Path:
    """Folder of a model."""
    return _folder("models", name)


@lru_cache
def tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A real tokenizer, one of `TOKENIZERS`."""
    folder = model_folder("smollm2-135m-instruct") if name == "smollm2" else _folder("tokenizers", name)
    return load_tokenizer(str(folder))
