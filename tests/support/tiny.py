"""Tiny random models with the trained tokenizers of the zoo, and a few rows of data, for tests of the trainers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import support.tokenizers_zoo as zoo
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from diglot.trainers import GKDConfig, GKDTrainer, MiniLLMConfig, MiniLLMTrainer

CHAT_ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": f"Say {word}."},
            {"role": "assistant", "content": f"{word}, as you asked: {word}!"},
        ]
    }
    for word in ("hello", "naïve café", "数学", "x = 1\n", "👩‍🚀 fly", "مرحبا", "one two three", "  spaces  ")
]
PROMPT_ROWS: list[dict[str, Any]] = [{"prompt": row["messages"][:1]} for row in CHAT_ROWS]
TEXT_ROWS: list[dict[str, Any]] = [{"text": row["messages"][1]["content"]} for row in CHAT_ROWS]


def tiny_model(
    tokenizer: PreTrainedTokenizerBase, seed: int = 0, padding_rows: int = 0, **config: Any
) -> LlamaForCausalLM:
    """A random Llama of two layers in float32 whose embedding fits `tokenizer`."""
    torch.manual_seed(seed)
    options = dict(
        vocab_size=len(tokenizer) + padding_rows,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(LlamaConfig(**{**options, **config})).eval()


def save(folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int = 0, **config: Any) -> str:
    """A tiny model and its tokenizer in a folder of their own; returns where."""
    tiny_model(tokenizer, seed, **config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_pair(root: Path) -> dict[str, str]:
    """A student and a teacher whose tokenizers differ, and conversations: `student`, `teacher` and `data.jsonl`."""
    data = root / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in CHAT_ROWS), encoding="utf-8")
    student, teacher = save(root / "student", zoo.chatml(), 0), save(root / "teacher", zoo.inst(), 1)
    return {"student": student, "teacher": teacher, data.name: str(data)}


def gkd(
    out: Path,
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]] = CHAT_ROWS,
    *,
    models: tuple[Any, Any] | None = None,
    keywords: dict[str, Any] | None = None,
    **options: Any,
) -> GKDTrainer:
    """A GKD trainer on tiny models; `options` go to the config, `keywords` to the trainer."""
    args = GKDConfig(**{**_common(out), **options})
    models = models or (tiny_model(student, 0), tiny_model(teacher, 1))
    return GKDTrainer(*models, args, **_data(rows, student, teacher), **(keywords or {}))


def minillm(
    out: Path,
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]] = PROMPT_ROWS,
    *,
    models: tuple[Any, Any] | None = None,
    keywords: dict[str, Any] | None = None,
    **options: Any,
) -> MiniLLMTrainer:
    """A MiniLLM trainer on tiny models."""
    args = MiniLLMConfig(**{**_common(out), **options})
    models = models or (tiny_model(student, 0), tiny_model(teacher, 1))
    return MiniLLMTrainer(*models, args, **_data(rows, student, teacher), **(keywords or {}))


def _common(out: Path) -> dict[str, Any]:
    return dict(
        output_dir=str(out),
        per_device_train_batch_size=4,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        max_completion_length=8,
        max_length=256,
        disable_tqdm=True,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        log_rollouts=0,
    )


def _data(rows: list[dict[str, Any]], student: Any, teacher: Any) -> dict[str, Any]:
    return dict(
        train_dataset=Dataset.from_list(rows),
        processing_class=student,
        teacher_processing_class=teacher,
    )


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}
