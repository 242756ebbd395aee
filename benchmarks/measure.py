"""What the benchmarks share: the demo pair on real text, peak memory, and who measured."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
from assets import fetch_model, fetch_texts, fetch_tokenizer

from diglot import GKDConfig, GKDTrainer
from diglot.batches import AlignedBatch


def rows_of_text(rows: int, words: int = 48) -> list[dict[str, str]]:
    """Real prose cut into a prompt of twelve words and the rest of `words` as its completion."""
    texts = [row["text"].split(" ") for row in fetch_texts("passages", "train")[:rows]]
    return [{"prompt": " ".join(w[:12]), "completion": " " + " ".join(w[12:words])} for w in texts]


def demo_trainer(objective: Any, rows: int, words: int = 48, **options: Any) -> GKDTrainer:
    """The demo pair on reference text: off-policy, so that no generation is timed."""
    student, teacher = (fetch_model(name) for name in ("smollm2-135m-instruct", "gemma-3-270m"))
    args = GKDConfig(
        output_dir="runs/bench",
        lmbda=0.0,
        beta=1.0,
        objective=objective,
        per_device_train_batch_size=rows,
        use_cpu=True,
        **options,
    )
    return GKDTrainer(
        AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32),
        AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32),
        args,
        train_dataset=Dataset.from_list(rows_of_text(rows, words)),
        processing_class=AutoTokenizer.from_pretrained(student),
    )


def prepared_batch(trainer: GKDTrainer) -> AlignedBatch:
    """All rows of the trainer's data, read and aligned."""
    data: Any = trainer.train_dataset
    samples = trainer.data_collator([data[i] for i in range(len(data))])
    (inputs,), _ = trainer.get_batch_samples(iter([samples]), 1, trainer.args.device)
    return inputs["batch"]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A real tokenizer: `smollm2`, or one of `assets.TOKENIZERS`."""
    folder = fetch_model("smollm2-135m-instruct") if name == "smollm2" else fetch_tokenizer(name)
    return AutoTokenizer.from_pretrained(folder)


class PeakMemory:
    """Bytes of resident memory at the highest point inside the block, above those at its start (Linux)."""

    def __enter__(self) -> PeakMemory:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        self.start = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = _status("VmHWM") - self.start


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def machine() -> str:
    """Processor, threads and versions, for the head of a table."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, python {platform.python_version()}"
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {versions}"
