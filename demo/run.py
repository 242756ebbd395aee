"""Distil one real model into another with a different tokenizer, and show what changed.

    python demo/run.py                    # GKD, Gemma-3-270M -> SmolLM2-135M, a few minutes on 2 cores
    python demo/run.py --trainer minillm
    python demo/run.py --pair instruct    # Qwen2.5-Coder-0.5B-Instruct -> SmolLM2-135M-Instruct, about 50 minutes

Everything here is the public interface: what this script does, yours can do.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from assets import fetch_model, fetch_texts
from datasets import Dataset
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer

from diglot import GKDConfig, GKDTrainer, MiniLLMConfig, MiniLLMTrainer
from diglot.data import Sample, to_sample
from diglot.evaluation import OnPolicyReport, ReferenceReport
from diglot.trainers.base import DistillationTrainer

console = Console()


@dataclass(frozen=True)
class Recipe:
    """One pair of models and how long it trains."""

    student: str
    teacher: str
    max_steps: dict[str, int]  # by trainer
    batch: int
    max_completion_length: int
    learning_rate: float
    eval_prompts: int


PAIRS = {
    "base": Recipe(
        student="smollm2-135m-instruct",
        teacher="gemma-3-270m",
        max_steps={"gkd": 18, "minillm": 18},
        batch=16,
        max_completion_length=48,
        learning_rate=5e-5,
        eval_prompts=48,
    ),
    "instruct": Recipe(
        student="smollm2-135m-instruct",
        teacher="qwen2.5-coder-0.5b-instruct",
        max_steps={"gkd": 18, "minillm": 18},
        batch=16,
        max_completion_length=96,
        learning_rate=5e-5,
        eval_prompts=24,
    ),
}


def passage_rows(split: str, number: int) -> list[dict[str, Any]]:
    """Plain text for two base models: the first dozen words as the prompt, what follows as the reference."""
    rows = []
    for row in fetch_texts("passages", split)[:number]:
        words = row["text"].split(" ")
        rows.append({"prompt": " ".join(words[:12]), "completion": " " + " ".join(words[12:72])})
    return rows


def task_rows(split: str, number: int) -> list[dict[str, Any]]:
    """Conversations for two instruct models: maths word problems and small programs, by turns."""
    maths = [(r["question"], r["answer"]) for r in fetch_texts("gsm8k", split)[:number]]
    code = [
        (f"Complete this Python code.\n\n{r['prompt']}", r["solution"]) for r in fetch_texts("code", split)[:number]
    ]
    turns = [pair for both in zip(maths, code, strict=False) for pair in both]
    return [
        {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}
        for q, a in turns[:number]
    ]


def make_trainer(
    recipe: Recipe, pair: str, trainer: str, out: Path, max_steps: int | None, seed: int
) -> DistillationTrainer:
    """Both models as float32 (on a CPU the fastest), the dataset, and the trainer; `seed` of order and rollouts."""
    rows = passage_rows if pair == "base" else task_rows
    steps = max_steps or recipe.max_steps[trainer]
    common: dict[str, Any] = dict(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=recipe.batch,
        learning_rate=recipe.learning_rate,
        max_completion_length=recipe.max_completion_length,
        max_length=640,
        temperature=1.0,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        logging_steps=1,
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        per_device_eval_batch_size=24,
    )
    student, teacher = fetch_model(recipe.student), fetch_model(recipe.teacher)
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (student, teacher)]
    data: dict[str, Any] = dict(
        train_dataset=Dataset.from_list(rows("train", steps * recipe.batch)),
        processing_class=AutoTokenizer.from_pretrained(student),
    )
    if trainer == "gkd":
        args = GKDConfig(**common, lmbda=1.0)
        return GKDTrainer(models[0], models[1], args, **data)
    return MiniLLMTrainer(models[0], models[1], MiniLLMConfig(**common, num_iterations=2), **data)


@dataclass(frozen=True)
class Measured:
    """One evaluation, with two seeds."""

    reference: ReferenceReport
    written: tuple[OnPolicyReport, OnPolicyReport]

    @property
    def both(self) -> OnPolicyReport:
        """The samples of both seeds."""
        return OnPolicyReport.joined(self.written)

    def numbers(self) -> dict[str, float]:
        """What goes into `summary.json`."""
        both = self.both
        return {
            "reverse_kl_nats_per_byte": both.reverse_kl_nats_per_byte,
            "bits_per_byte": self.reference.bits_per_byte,
            "stop_agreement": both.stop_agreement,
            "coverage": both.coverage,
            "surprisal_nats_per_byte": both.surprisal_nats_per_byte,
        }

    def seed_noise(self) -> float:
        """What the other seed changes of the divergence, nats per byte."""
        one, other = (r.reverse_kl_nats_per_byte for r in self.written)
        return abs(one - other)


def noises(before: Measured, after: Measured) -> dict[str, float]:
    """How far another draw of samples moves each number; of the two measurements, the larger."""
    return {
        "reverse_kl_nats_per_byte": max(before.seed_noise(), after.seed_noise()),
        "bits_per_byte": max(before.reference.bits_per_byte_error, after.reference.bits_per_byte_error),
        "stop_agreement": max(before.both.stop_agreement_error, after.both.stop_agreement_error),
    }


def measure(trainer: DistillationTrainer, samples: Sequence[Sample]) -> Measured:
    """Bits per byte of the held-out references, and the divergence on fresh samples of two seeds."""
    evaluator, conversations = trainer.evaluator(), [s.conversation for s in samples]
    length = trainer.args.max_completion_length
    written = tuple(
        evaluator.on_policy(conversations, trainer.sampler, max_new_tokens=length, seed=seed) for seed in (1000, 2000)
    )
    return Measured(evaluator.on_reference(samples), written)  # type: ignore[arg-type]


def show(before: Measured, after: Measured, noise: Mapping[str, float], prompts: Sequence[str]) -> None:
    """The table, and three completions before and after."""
    b, a = before.numbers(), after.numbers()
    lines = [
        ("divergence student -> teacher, fresh samples", "reverse_kl_nats_per_byte", "nats per byte"),
        ("held-out text", "bits_per_byte", "bits per byte"),
        ("stop-probability agreement", "stop_agreement", "0 to 1"),
        ("alignment coverage", "coverage", "share of tokens"),
    ]
    table = Table("", title="Before and after")
    for column in ("before", "after", "noise"):
        table.add_column(column, justify="right")
    table.add_column("unit")
    for text, k, unit in lines:
        table.add_row(text, f"{b[k]:.4f}", f"{a[k]:.4f}", f"± {noise[k]:.4f}" if k in noise else "", unit)
    console.print(table)
    for i in range(3):
        for name, measured in (("before", before), ("after", after)):
            shown = Text(prompts[i], style="dim") + Text(measured.written[0].completions[i])
            console.print(Panel(shown, title=f"sample {i + 1}, {name}"))


def main() -> None:
    """Measure, train, measure again, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=sorted(PAIRS), default="base")
    parser.add_argument("--trainer", choices=["gkd", "minillm"], default="gkd")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--max_steps", type=int, default=None, help="optimizer steps, when not the recipe's own")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the rows and of what the student writes")
    options = parser.parse_args()

    recipe, clock = PAIRS[options.pair], {"start": time.time()}
    trainer = make_trainer(recipe, options.pair, options.trainer, options.out, options.max_steps, options.seed)
    rows = (passage_rows if options.pair == "base" else task_rows)("heldout", recipe.eval_prompts)
    samples = [to_sample(row, where=f"held-out row {i}") for i, row in enumerate(rows)]
    clock["prepare"] = time.time()
    console.print(
        f"[bold]{recipe.teacher}[/] teaches [bold]{recipe.student}[/] ({options.trainer}). Measuring before ..."
    )
    before = measure(trainer, samples)
    clock["evaluate_before"] = time.time()
    trainer.train()
    clock["train"] = time.time()
    console.print("Measuring after ...")
    after = measure(trainer, samples)
    clock["evaluate_after"] = time.time()
    folder = options.out / "student"
    trainer.save_model(str(folder))

    prompts = [row["prompt"] if options.pair == "base" else row["prompt"][0]["content"] + "\n" for row in rows]
    noise = noises(before, after)
    show(before, after, noise, prompts)
    times = list(clock.items())
    seconds = {name: round(t - times[i][1], 1) for i, (name, t) in enumerate(times[1:])}
    summary = {
        "before": before.numbers(),
        "after": after.numbers(),
        "seconds": seconds,
        "coverage": after.numbers()["coverage"],
        "noise": noise,
        "pair": options.pair,
        "trainer": options.trainer,
        "steps": trainer.state.global_step,
    }
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    name = "reverse_kl_nats_per_byte"
    gain = summary["before"][name] - summary["after"][name]
    verdict = "lower by more than" if gain > noise[name] else "[bold red]not lower by more than[/]"
    console.print(
        f"The divergence fell by {gain:.4f} nats per byte: {verdict} the noise of another seed ({noise[name]:.4f})."
    )
    console.print(f"Student: [bold]{folder}[/]   numbers: [bold]{options.out / 'summary.json'}[/]   seconds: {seconds}")


if __name__ == "__main__":
    main()
