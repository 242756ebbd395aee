"""Tiny models in folders, and public texts of a few rows in a cache of their own: a real declaration runs on these."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from support.tiny import save
from transformers import PreTrainedTokenizerBase


def save_model(folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int, spread: float, **config: int) -> Path:
    """A random model that is sure of itself as far as `spread` (of its weights) is large, in `folder`."""
    save(folder, tokenizer, seed, initializer_range=spread, **config)
    return folder


def write_rows(cache: Path, rows: int = 24) -> None:
    """What `demo/assets.py` would fetch: a third is held out."""
    kinds: dict[str, Callable[[int], dict[str, str]]] = {
        "texts/passages": lambda i: {"text": " ".join(f"w{(i * 7 + j) % 23}" for j in range(70))},
        "texts/gsm8k": lambda i: {"question": f"What is {i} plus 2?", "answer": f"{i} + 2 is {i + 2}.\n#### {i + 2}"},
        "tasks/math": lambda i: {
            "question": f"What is ${i}/3$?",
            "answer": rf"\frac{{{i}}}{{3}}",
            "solution": rf"It is $\boxed{{\frac{{{i}}}{{3}}}}$.",
        },
        "tasks/programs": lambda i: {
            "prompt": f"def add{i}(x):\n",
            "solution": f"    return x + {i}\n",
            "tests": f"assert add{i}(1) == {i + 1}",
            "entry_point": f"add{i}",
            "source": ("humaneval", "mbpp")[i // 3 % 2],
        },
    }
    for name, make in kinds.items():
        path = cache / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [{"id": f"{name}/{i}", "split": ("heldout", "train", "train")[i % 3], **make(i)} for i in range(rows)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
