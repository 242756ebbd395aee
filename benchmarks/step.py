"""What a training step costs beyond its two models.

One on-policy step without generation (read, align, both forward passes, the loss, backward) of the real demo pair,
against the bare floor on the same texts: student forward and backward, teacher forward, with the logits that such
models make, and nothing else. Both alternate in one process; the ratio of medians stands last.

    python benchmarks/step.py [--objective strict] [--repeats 7]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
from assets import fetch_model, fetch_texts

from diglot import GKDConfig, GKDTrainer
from diglot.batches import AlignedBatch


def make_trainer(objective: str, rows: int) -> GKDTrainer:
    """The demo pair on reference text of about 60 tokens a row: off-policy, so that no generation is timed."""
    student, teacher = (fetch_model(name) for name in ("smollm2-135m-instruct", "gemma-3-270m"))
    texts = [row["text"].split(" ") for row in fetch_texts("passages", "train")[:rows]]
    data = [{"prompt": " ".join(w[:12]), "completion": " " + " ".join(w[12:48])} for w in texts]
    args = GKDConfig(
        output_dir="runs/bench",
        lmbda=0.0,
        beta=1.0,
        objective=objective,
        per_device_train_batch_size=rows,
        use_cpu=True,
    )
    return GKDTrainer(
        AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32),
        AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32),
        args,
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(student),
    )


def floor(trainer: GKDTrainer, batch: AlignedBatch) -> None:
    """Both models on the step's own inputs, whole logits, the cheapest loss there is."""
    side = batch.student
    logits = trainer.model(input_ids=side.input_ids, attention_mask=side.attention_mask, use_cache=False).logits
    logits.sum().backward()
    with torch.no_grad():
        other = batch.teacher
        trainer.teacher.model(input_ids=other.input_ids, attention_mask=other.attention_mask, use_cache=False)
    trainer.model.zero_grad(set_to_none=True)


def step(trainer: GKDTrainer) -> tuple[AlignedBatch, float]:
    """One step; the batch, and the seconds of reading and aligning in it."""
    start = time.perf_counter()
    samples = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
    (inputs,), _ = trainer.get_batch_samples(iter([samples]), 1, trainer.args.device)
    aligned = time.perf_counter() - start
    trainer.compute_loss(trainer.model, inputs).backward()
    trainer.model.zero_grad(set_to_none=True)
    return inputs["batch"], aligned


def main() -> None:
    """Alternate step and floor, print the table and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", default="strict")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    trainer = make_trainer(options.objective, options.rows)
    batch, _ = step(trainer)  # warm both up
    floor(trainer, batch)
    seconds: dict[str, list[float]] = {"step": [], "floor": [], "reading and alignment": []}
    for i in range(options.repeats):
        for name in ("step", "floor") if i % 2 else ("floor", "step"):
            start = time.perf_counter()
            if name == "step":
                seconds["reading and alignment"].append(step(trainer)[1])
            else:
                floor(trainer, batch)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, python {platform.python_version()}"
    tokens = int(batch.student.attention_mask.sum()), int(batch.teacher.attention_mask.sum())
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, {versions}; objective {options.objective}")
    print(f"{options.rows} rows, {tokens[0]} student and {tokens[1]} teacher tokens, {len(batch.student.rows)} scored")
    for name, values in seconds.items():
        print(f"{name:24s} median {medians[name]:7.3f} s   min {min(values):7.3f}   max {max(values):7.3f}")
    share = medians["reading and alignment"] / medians["step"]
    ratio = medians["step"] / medians["floor"]
    print(json.dumps({"alignment_share_of_step": round(share, 4)}))
    print(f"step / floor = {ratio:.3f}")


if __name__ == "__main__":
    main()
