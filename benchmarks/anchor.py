"""Does the next-byte objective need a segmentation anchor? A small student from scratch, the same text for every arm.

The student has a byte-level BPE of 4,096 tokens, trained on the training text, and four layers; the teacher is
SmolLM2-135M. Off-policy: reference text of about 60 tokens a row. After equal numbers of steps each arm's held-out bits
per byte is the cross-entropy of the student's canonical tokens over the bytes of the text. One seed for all arms: same
start, same order.

    python benchmarks/anchor.py [--steps 200] [--arms ce byte byte+anchor ...]
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from datasets import Dataset
from measure import fetch_model, fetch_texts, machine
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from diglot import GKDConfig, GKDTrainer

ARMS: dict[str, Any] = {
    "ce": "ce",
    "byte": [{"name": "byte", "anchor": 0.0, "beta": 0.0}],
    "byte+anchor": [{"name": "byte", "anchor": 1.0, "beta": 0.0}],
    "byte+ce": [{"name": "byte", "anchor": 0.0, "beta": 0.0, "weight": 0.5}, {"name": "ce", "weight": 0.5}],
    "shared_prefix": [{"name": "shared_prefix", "beta": 0.0}],
    "shared_prefix+ce": [{"name": "shared_prefix", "beta": 0.0, "weight": 0.5}, {"name": "ce", "weight": 0.5}],
    "bpm": [{"name": "bpm"}],
    "strict": [{"name": "strict", "beta": 0.0, "top_k": 0, "residual": True}],
}


def small_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 4,096 tokens of these texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")


def rows_of(split: str, rows: int, words: int = 44) -> list[dict[str, str]]:
    """Passages as a two-word prompt and the rest."""
    texts = [row["text"].split(" ") for row in fetch_texts("passages", split)[:rows]]
    return [{"prompt": " ".join(w[:2]), "completion": " " + " ".join(w[2:words])} for w in texts]


def run(arm: str, steps: int, batch: int) -> dict[str, float]:
    """Train one arm; held-out bits per byte before and after."""
    torch.manual_seed(0)
    tokenizer = small_tokenizer([row["text"] for row in fetch_texts("passages", "train")])
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    folder = fetch_model("smollm2-135m-instruct")
    trainer = GKDTrainer(
        LlamaForCausalLM(config),
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        GKDConfig(
            output_dir="runs/anchor", lmbda=0.0, objective=ARMS[arm], max_steps=steps, use_cpu=True, disable_tqdm=True,
            per_device_train_batch_size=batch, learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=20,
            logging_steps=max(steps // 5, 1), save_strategy="no", max_length=256, max_completion_length=64,
        ),
        train_dataset=Dataset.from_list(rows_of("train", 2000)),
        processing_class=tokenizer,
        teacher_processing_class=AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    held_out = [as_sample(row) for row in rows_of("heldout", 64)]
    start = trainer.evaluator().on_reference(held_out).bits_per_byte
    began = time.perf_counter()
    trainer.train()
    end = trainer.evaluator().on_reference(held_out).bits_per_byte
    first, *_, last = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "before": start,
        "after": end,
        "loss_first": first,
        "loss_last": last,
        "seconds": time.perf_counter() - began,
    }


def as_sample(row: dict[str, str]) -> Any:
    """A row as the evaluator reads it."""
    from diglot.data import to_sample

    return to_sample(row, where="held-out row")


def main() -> None:
    """Run the arms one after the other and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    options = parser.parse_args()
    print(machine())
    rows = {}
    for arm in options.arms:
        rows[arm] = run(arm, options.steps, options.batch)
        row = rows[arm]
        print(
            f"{arm:18s} bits per byte {row['before']:.3f} -> {row['after']:.3f}   own loss {row['loss_first']:.3f} -> "
            f"{row['loss_last']:.3f}   {row['seconds']:.0f} s",
            flush=True,
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
