"""Sums in words: what an objective does to numbers that one tokenizer reads whole and the other digit by digit.

The teacher's tokenizer reads up to three digits as one token, the student's every digit alone (`--direction coarser`:
the other way round). The teacher knows every sum; the student writes well-formed sentences whose sums are wrong by up
to four. Held out are pairs of numbers that no prompt of the student's training contains. `jsd` is the control: its
teacher has the student's tokenizer. No distillation begins before both teachers answer more than 95 % of the held-out
sums exactly. `--real` takes the tokenizers of Qwen3 and Llama 3; `--tasks words code` other sentences (tasks.py).

    python benchmarks/sums.py strict bpm jsd [--seeds 0 1 2] [--policies on off] [--directions finer coarser]
    python benchmarks/sums.py covering jsd --real --tasks numbers words code --seeds 0

Everything is made from scratch. Models are kept under `DIGLOT_CACHE`, cells in `--out`, each with the code that ran it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import logging
import math
import os
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tasks
import torch
from arms import Arm, Cells, code_digest, markdown, mean_of
from datasets import Dataset
from tasks import REAL, TASKS, Task, ids_of, made_tokenizer, real_tokenizer
from toys import STOP, recipe_digest
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
)
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
from assets import cache

from diglot.errors import StoppedError

LONGEST = 24  # tokens of a completion


class NotLearntError(RuntimeError):
    """A teacher that does not know the task: nothing distilled from it would mean anything."""


@functools.cache
def tokenizer_of(task: Task, whole: bool, real: bool) -> PreTrainedTokenizerFast:
    """The task's tokenizer: one that reads it in larger pieces (`whole`) or in smaller ones."""
    return real_tokenizer(task, cache() / "tokenizers" / REAL[whole]) if real else made_tokenizer(task, whole)


def padded(rows: Sequence[Sequence[int]], left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask."""
    width = max(map(len, rows))
    fill = [width - len(row) for row in rows]
    ids = [[STOP] * n + [*row] if left else [*row] + [STOP] * n for row, n in zip(rows, fill, strict=True)]
    mask = [[0] * n + [1] * len(row) if left else [1] * len(row) + [0] * n for row, n in zip(rows, fill, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def written_log_probs(model: Any, prompts: Sequence[list[int]], rest: Sequence[list[int]]) -> torch.Tensor:
    """Log-prob in nats of each `rest` behind its prompt, `[texts]`; has a gradient."""
    ids, mask = padded([p + r for p, r in zip(prompts, rest, strict=True)])
    every = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    chosen = every.gather(-1, ids[:, 1:, None])[..., 0]
    place = torch.arange(ids.shape[1] - 1)
    start = torch.tensor([len(p) - 1 for p in prompts])[:, None]
    end = torch.tensor([len(p) + len(r) - 1 for p, r in zip(prompts, rest, strict=True)])[:, None]
    return (chosen * ((place >= start) & (place < end))).sum(-1)


@torch.no_grad()
def write(model: Any, tokenizer: Any, prompts: Sequence[str], sample: bool) -> list[list[int]]:
    """What the model writes behind each prompt, with its stop if it came to one."""
    ids, mask = padded([ids_of(tokenizer, prompt) for prompt in prompts], left=True)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=LONGEST,
        do_sample=sample,
        **({"top_k": 0, "top_p": 1.0, "temperature": 1.0} if sample else {}),
        pad_token_id=STOP,
        eos_token_id=STOP,
    )
    rows = out[:, ids.shape[1] :].tolist()
    return [row[: row.index(STOP) + 1] if STOP in row else row for row in rows]


def accuracy(model: Any, tokenizer: Any, rows: Sequence[tuple[str, str]]) -> float:
    """Share of rows that greedy decoding completes exactly."""
    completions = write(model, tokenizer, [prompt for prompt, _ in rows], sample=False)
    right = [
        tokenizer.decode(ids, skip_special_tokens=True) == text
        for ids, (_, text) in zip(completions, rows, strict=True)
    ]
    return sum(right) / len(rows)


def bits_per_byte(model: Any, tokenizer: Any, rows: Sequence[tuple[str, str]]) -> float:
    """Of the canonical tokens of right texts and their stop."""
    with torch.no_grad():
        prompts = [ids_of(tokenizer, prompt) for prompt, _ in rows]
        log_probs = written_log_probs(model, prompts, [[*ids_of(tokenizer, text), STOP] for _, text in rows])
    return float(-log_probs.sum()) / math.log(2) / sum(len(text.encode()) for _, text in rows)


@torch.no_grad()
def divergence(student: Any, teacher: Any, tokenizers: Sequence[Any], prompts: Sequence[str]) -> dict[str, Any]:
    """KL(student || teacher) in nats per byte by the log-ratio of fresh samples. The teacher reads a sample's text as
    its own canonical tokens; texts that did not stop are read without a stop on both sides, and counted."""
    completions = write(student, tokenizers[0], prompts, sample=True)
    texts = [tokenizers[0].decode(ids, skip_special_tokens=True) for ids in completions]
    stops = [ids[-1:] == [STOP] for ids in completions]
    read = [ids_of(tokenizers[1], text) + [STOP] * stop for text, stop in zip(texts, stops, strict=True)]
    own, other = (
        written_log_probs(model, [ids_of(tokenizer, prompt) for prompt in prompts], rest).sum()
        for model, tokenizer, rest in ((student, tokenizers[0], completions), (teacher, tokenizers[1], read))
    )
    return {
        "reverse_kl": float(own - other) / max(1, sum(len(text.encode()) for text in texts)),
        "stopped": sum(stops) / len(stops),
        "samples": texts[:4],
    }


def learn(model: Any, tokenizer: Any, task: Task, right: bool, steps: int, seed: int, enough: float = 0.99) -> None:
    """Cross-entropy on all sentences of the task. With `right` ones it ends as soon as `enough` answers are exact."""
    draw, held = random.Random(seed), task.rows(5, 200, "held")
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / 50) * (1 - i / steps))
    for i in range(steps):
        rows = [task.row(draw, "all", right) for _ in range(64)]
        texts = [[*ids_of(tokenizer, prompt + text), STOP] for prompt, text in rows]
        ids, mask = padded(texts)
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if i % 100 == 99:
            exact = accuracy(model, tokenizer, held) if right else 0.0
            print(f"step {i + 1} loss {loss.item():.3f} exact {exact:.3f}", file=sys.stderr, flush=True)
            if exact >= enough:
                break
    model.eval()


def llama(tokenizer: PreTrainedTokenizerBase, width: int, layers: int, seed: int) -> LlamaForCausalLM:
    """A random model in float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        eos_token_id=STOP,
        pad_token_id=STOP,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@dataclass(frozen=True)
class Numbers:
    """The benchmark in one direction; `models` is the folder that keeps what was learnt."""

    direction: str = "finer"
    task: Task = TASKS["numbers"]
    width: int = 64
    layers: int = 3
    steps: int = 2000
    student_steps: int = 600
    models: Path | None = None
    real: bool = False  # tokenizers of Qwen3 and Llama 3 instead of made ones

    @functools.cached_property
    def tokenizers(self) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
        """The student's and the teacher's."""
        whole = self.direction == "coarser"
        return tokenizer_of(self.task, whole, self.real), tokenizer_of(self.task, not whole, self.real)

    def model(self, whole: bool, right: bool) -> Any:
        """A model that has learnt right sums, or wrong ones; from disk if it was made before."""
        steps, seed = (self.steps, 1) if right else (self.student_steps, 2)
        tokenizer = tokenizer_of(self.task, whole, self.real)
        model = llama(tokenizer, self.width, self.layers, seed)
        recipe = [repr(self.task), whole, right, self.width, self.layers, steps, seed, self.real]
        name = recipe_digest(recipe, learn, llama, type(self.task), made_tokenizer, real_tokenizer)
        place = self.models / f"{name}.pt" if self.models else None
        if place and place.exists():
            model.load_state_dict(torch.load(place, weights_only=True))
            return model
        learn(model, tokenizer, self.task, right, steps, seed)
        if place:
            place.parent.mkdir(parents=True, exist_ok=True)
            part = place.with_suffix(f".{os.getpid()}")
            torch.save(model.state_dict(), part)
            part.replace(place)
        return model

    def teacher(self, control: bool) -> tuple[Any, PreTrainedTokenizerFast]:
        """The teacher and its tokenizer, the student's own for the control. `NotLearntError` if it knows too little."""
        tokenizer = self.tokenizers[0 if control else 1]
        model = self.model((self.direction == "coarser") == control, right=True)
        exact = accuracy(model, tokenizer, self.task.rows(6, 400, "held"))
        if exact <= 0.95:
            raise NotLearntError(
                f"The teacher answers {exact:.1%} of the held-out {self.task.name} exactly; it must be more than 95 %. "
                f"Give it more than {self.steps} steps or more than {self.width} dimensions."
            )
        return model, tokenizer

    def scores(self, student: Any, teacher: Any, tokenizer: Any, count: int) -> dict[str, Any]:
        """Everything that is measured: on held-out sentences, and answers on sentences of the training's kind too."""
        own, rows = self.tokenizers[0], self.task.rows(7, count, "held")
        torch.manual_seed(7)
        return {
            "accuracy": accuracy(student, own, rows),
            "accuracy_trained": accuracy(student, own, self.task.rows(8, count, "train")),
            "bits_per_byte": bits_per_byte(student, own, rows),
            **divergence(student, teacher, (own, tokenizer), [prompt for prompt, _ in rows]),
        }

    def run(self, arm: Arm, policy: str, seed: int, steps: int, batch: int, rate: float, count: int) -> dict[str, Any]:
        """One cell."""
        teacher, tokenizer = self.teacher(control=arm.names("jsd"))
        student = self.model(self.direction == "coarser", right=False)
        before = self.scores(student, teacher, tokenizer, count)
        rows = self.task.rows(100 + seed, steps * batch, "train")
        with tempfile.TemporaryDirectory() as folder:
            common: dict[str, Any] = dict(
                output_dir=folder,
                use_cpu=True,
                max_steps=steps,
                learning_rate=rate,
                lr_scheduler_type="cosine",
                warmup_steps=min(10, steps // 2),
                adam_beta2=0.98,
                per_device_train_batch_size=batch,
                max_completion_length=LONGEST,
                max_length=96,
                min_coverage=0.0,
                log_rollouts=0,
                logging_steps=max(steps // 5, 1),
                save_strategy="no",
                disable_tqdm=True,
                seed=seed,
            )
            if not arm.minillm:
                common["lmbda"] = 1.0 if policy == "on" else 0.0
            trainer = arm.trainer(
                student,
                teacher,
                common,
                train_dataset=Dataset.from_list([{"prompt": p, "completion": c} for p, c in rows]),
                processing_class=self.tokenizers[0],
                teacher_processing_class=tokenizer,
            )
            trainer.remove_callback(PrinterCallback)
            began = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - began
        logs = [log for log in trainer.state.log_history if "loss" in log]
        return {
            "before": before,
            "after": self.scores(student.eval(), teacher, tokenizer, count),
            "loss": [log["loss"] for log in logs],
            "one_to_one": [log.get("align/one_to_one") for log in logs],
            "seconds": seconds,
        }


def show(results: Sequence[dict[str, Any]]) -> str:
    """A row per arm: before, and after training with each seed's value beside the mean."""
    measures = {
        "accuracy": "held-out accuracy",
        "accuracy_trained": "accuracy on trained pairs",
        "bits_per_byte": "bits per byte",
        "reverse_kl": "reverse KL, nats/byte",
    }
    head = ["objective", *measures.values(), "one-to-one over time", "it writes", "s"]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for r in results:
        groups.setdefault((f"{r['task']}, {r['direction']}", r["arm"], r["policy"]), []).append(r)
    rows, begun = [], set()
    for (direction, label, policy), group in groups.items():
        title = f"{direction}, `{label}`, {policy}-policy"
        ran = [r for r in group if "after" in r]
        if not ran:
            rows.append([title, group[0]["error"].partition(":")[0], *["-"] * (len(head) - 2)])
            continue
        start, control = ran[0]["before"], Arm.parse(label).names("jsd")
        if (direction, control) not in begun:
            begun.add((direction, control))
            shown = [f"{start[key]:.3f}" for key in measures]
            name = f"{direction}, before{', equal tokenizers' if control else ''}"
            rows.append([name, *shown, "-", f"“{start['samples'][0].strip()}”", "-"])
        values = [mean_of([r["after"][key] for r in ran], 3) for key in measures]
        shares = [f"{share:.2f}" for share in ran[0]["one_to_one"] if share is not None]
        sample = f"“{ran[0]['after']['samples'][0].strip()}”"
        seconds = sum(r["seconds"] for r in ran) / len(ran)
        rows.append([title, *values, " ".join(shares) or "-", sample, f"{seconds:.0f}"])
    return markdown(head, rows)


def measure(
    bench: Numbers, arms: Sequence[Arm], policies: Sequence[str], seeds: Sequence[int], cells: Cells, **run: Any
) -> list[dict[str, Any]]:
    """All cells of one direction. What fails is shown in its place; a teacher that knows too little ends everything."""
    results = []
    for arm in arms:
        for policy in ["on"] if arm.minillm else policies:
            for seed in seeds:
                setting = dict(arm=arm.label, policy=policy, seed=seed, direction=bench.direction, **run)
                setting |= {"task": bench.task.name, "real": bench.real}
                setting["bench"] = [repr(bench.task), bench.width, bench.layers, bench.steps, bench.student_steps]
                try:
                    result = cells.result(setting, lambda a=arm, p=policy, s=seed: bench.run(a, p, s, **run))
                except (NotLearntError, StoppedError):
                    raise
                except Exception as error:  # one arm's failure ends no table
                    result = {**setting, "error": f"{type(error).__name__}: {error}"}
                results.append(result)
                shown = "accuracy {accuracy:.3f}, {accuracy_trained:.3f} on trained pairs, {reverse_kl:.3f} nats/byte"
                end = result.get("error") or shown.format(**result["after"])
                print(
                    f"{bench.task.name} {bench.direction} {arm.label} {policy} seed {seed}: {end}",
                    file=sys.stderr,
                    flush=True,
                )
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cells and print the table; 1 if a cell failed or a teacher has not learnt the task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", type=Arm.parse, help="see benchmarks/arms.py")
    parser.add_argument("--tasks", nargs="+", default=["numbers"], choices=list(TASKS))
    parser.add_argument("--real", action="store_true", help="the tokenizers of Qwen3 (finer) and Llama 3")
    parser.add_argument("--directions", nargs="+", default=["finer"], choices=["finer", "coarser"])
    parser.add_argument("--policies", nargs="+", default=["on"], choices=["on", "off"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--count", type=int, default=200, help="held-out sentences that are measured")
    parser.add_argument("--out", type=Path, default=Path("runs/sums"))
    parser.add_argument("--any-code", action="store_true", help="take cells that other code has run")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    cells = Cells(options.out, code_digest(Path(__file__), Path(tasks.__file__)), options.any_code)
    run = dict(steps=options.steps, batch=options.batch, rate=options.rate, count=options.count)
    results = []
    if "words" in options.tasks and not options.real:
        parser.error("words are cut alike by made tokenizers: add --real")
    for task, direction in itertools.product(options.tasks, options.directions):
        bench = Numbers(direction, TASKS[task], models=cache() / "toys", real=options.real)
        try:
            results += measure(bench, options.arms, options.policies, options.seeds, cells, **run)
        except NotLearntError as error:
            print(f"sums: {error}", file=sys.stderr)
            return 1
    print(f"After {options.steps} steps of {options.batch} completions at {options.rate:g}\n\n{show(results)}")
    return int(any("error" in result for result in results))


if __name__ == "__main__":
    sys.exit(main())
