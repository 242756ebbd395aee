"""The laboratory of exact distributions: does an objective bring a student to its teacher's distribution over texts?

Texts are up to six letters long, so every token path of every text is summed: the divergences are those of whole
texts, whatever the tokenizers, and have no sampling noise. Both models are tiny Llamas that were fitted to known
distributions. A cell is 200 on-policy steps through the public trainers. Two starts:

- `other`: the student knows another distribution, about 4 nats away. How near does it come?
- `perfect`: the student was fitted to the teacher's distribution. How far is it pushed away? (0 is right.)

    python benchmarks/laboratory.py strict bpm "span:credit=whole" minillm [--pairs ...] [--seeds 0 1 2]

Prints a Markdown table of KL(student || teacher) in nats per text. `jsd`, for equal tokenizers only, is the control.
Cells that were run by the same code are read from `--out`. Models are kept under `DIGLOT_CACHE`.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import toys
from arms import Arm, Cells, code_digest, markdown, mean_of
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
from assets import cache

from diglot.errors import StoppedError

TWO_LETTERS = " ".join(f"{x}+{y}" for x in "abc" for y in "abc")
SOME = "a+b b+c ab+c c+a"
MERGES = {  # of the student, of the teacher
    "finer": ("", TWO_LETTERS),
    "coarser": (TWO_LETTERS, ""),
    "overlapping": (SOME, "c+b b+a a+b c+ab"),
    "equal": (SOME, SOME),
}
PAIRS, STARTS = tuple(MERGES), ("other", "perfect")
TEXTS = toys.Texts()
STUDENT, TEACHER = 2, 8  # seeds of the distributions, 4.06 nats apart


@dataclass(frozen=True)
class Laboratory:
    """A pair of tokenizers with fitted models; `models` is the folder that keeps them, if any."""

    pair: str
    texts: toys.Texts = TEXTS
    fit_steps: int = 600
    models: Path | None = None

    @cached_property
    def tokenizers(self) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
        """The student's and the teacher's."""
        student, teacher = (toys.bpe(merges) for merges in MERGES[self.pair])
        return student, teacher

    @cached_property
    def reader(self) -> toys.Reader:
        """Reads the student."""
        return toys.Reader(self.tokenizers[0], self.texts)

    @cached_property
    def teacher(self) -> tuple[Any, toys.Floats, float]:
        """Model, distribution over texts, canonical mass."""
        wanted = self.texts.random_distribution(TEACHER)
        return toys.fitted(self.tokenizers[1], self.texts, wanted, self.fit_steps, 11, self.models)

    def student(self, start: str) -> tuple[Any, toys.Floats, float]:
        """The same of the student, fitted to another distribution or to the teacher's own."""
        own = self.texts.random_distribution(STUDENT)
        wanted, steps = (own, 1) if start == "other" else (self.teacher[1][:, :-1], 2)
        return toys.fitted(self.tokenizers[0], self.texts, wanted, steps * self.fit_steps, 10, self.models)

    def divergences(self, student: toys.Floats) -> dict[str, float]:
        """Both directions of KL, nats per text, and the share of texts that are too long."""
        teacher = self.teacher[1]
        return {
            "reverse_kl": toys.kl(student, teacher),
            "forward_kl": toys.kl(teacher, student),
            "longer": float(student[:, -1].mean()),
        }

    def run(
        self, arm: Arm, seed: int, start: str, steps: int, batch: int, rate: float, windows: int = 1
    ) -> dict[str, Any]:
        """One cell. The models are read anew, so a cell depends on no other. An epoch has `windows` steps."""
        teacher, _, of_teacher = self.teacher
        student, before, canonical = self.student(start)
        prompts = list(self.texts.prompts)
        with tempfile.TemporaryDirectory() as folder:
            common: dict[str, Any] = dict(
                output_dir=folder,
                use_cpu=True,
                max_steps=steps,
                learning_rate=rate,
                lr_scheduler_type="linear",
                warmup_steps=min(5, steps // 2),
                per_device_train_batch_size=batch,
                max_completion_length=self.texts.length + 2,
                max_length=32,
                min_coverage=0.0,
                log_rollouts=0,
                logging_steps=max(steps // 5, 1),
                save_strategy="no",
                disable_tqdm=True,
                seed=seed,
            )
            rows = [{"prompt": prompts[i % len(prompts)]} for i in range(max(batch * windows, len(prompts)))]
            trainer = arm.trainer(
                student,
                teacher,
                common,
                train_dataset=Dataset.from_list(rows),
                processing_class=self.tokenizers[0],
                teacher_processing_class=self.tokenizers[1],
            )
            trainer.remove_callback(PrinterCallback)
            began = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - began
        after, canonical_after = self.reader.distribution(student.eval())
        logs = [log for log in trainer.state.log_history if "loss" in log]
        return {
            "before": {**self.divergences(before), "canonical": canonical},
            "after": {**self.divergences(after), "canonical": canonical_after},
            "teacher_canonical": of_teacher,
            "loss": [log["loss"] for log in logs],
            "one_to_one": [log.get("align/one_to_one") for log in logs],
            "seconds": seconds,
        }


def show(results: Sequence[dict[str, Any]]) -> str:
    """Rows are arms, columns pairs and starts; where a cell failed, the kind of its error."""
    columns = list(dict.fromkeys((r["start"], r["pair"]) for r in results))
    head = ["objective", *(f"{pair}, {start}" for start, pair in columns)]
    cells: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for r in results:
        cells.setdefault((r["arm"], r["start"], r["pair"]), []).append(r)
    start_row = ["before"]
    for start, pair in columns:
        column = [r for r in results if (r["start"], r["pair"]) == (start, pair) and "after" in r]
        start_row.append(f"{column[0]['before']['reverse_kl']:.2f}" if column else "-")
    rows = [start_row]
    for label in dict.fromkeys(r["arm"] for r in results):
        rows.append([f"`{label}`", *(_cell(cells.get((label, *column), [])) for column in columns)])
    return markdown(head, rows)


def _cell(results: Sequence[dict[str, Any]]) -> str:
    failed = [r["error"].partition(":")[0] for r in results if "error" in r]
    return failed[0] if failed else mean_of([r["after"]["reverse_kl"] for r in results])


def show_means(results: Sequence[dict[str, Any]]) -> str:
    """For each cell the reverse and forward KL and the canonical mass, means over seeds."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for r in results:
        if "after" in r:
            groups.setdefault((r["pair"], r["start"], r["arm"]), []).append(r)
    head = ["pair, start, objective", "reverse KL", "forward KL", "canonical", "longer", "one-to-one at the end", "s"]
    rows = []
    for (pair, start, label), group in groups.items():
        before_after = [
            " → ".join(f"{sum(r[when][key] for r in group) / len(group):.3f}" for when in ("before", "after"))
            for key in ("reverse_kl", "forward_kl", "canonical", "longer")
        ]
        share = [r["one_to_one"][-1] for r in group if r["one_to_one"] and r["one_to_one"][-1] is not None]
        seconds = sum(r["seconds"] for r in group) / len(group)
        rows.append([f"{pair}, {start}, `{label}`", *before_after, mean_of(share[:1]), f"{seconds:.0f}"])
    return markdown(head, rows)


def measure(
    laboratory: Laboratory, arms: Sequence[Arm], seeds: Sequence[int], starts: Sequence[str], cells: Cells, **run: Any
) -> list[dict[str, Any]]:
    """All cells of one pair, each announced as it ends. An arm that is refused or fails is a result, kept nowhere."""
    results = []
    for start in starts:
        for arm in arms:
            if arm.names("jsd") and laboratory.pair != "equal":
                continue
            for seed in seeds:
                setting = dict(arm=arm.label, pair=laboratory.pair, seed=seed, start=start, **run)
                setting["texts"], setting["fit_steps"] = repr(laboratory.texts), laboratory.fit_steps
                try:
                    result = cells.result(setting, lambda arm=arm, s=seed, b=start: laboratory.run(arm, s, b, **run))
                except StoppedError:
                    raise
                except Exception as error:  # one arm's failure is shown in its place and ends no table
                    result = {**setting, "error": f"{type(error).__name__}: {error}"}
                results.append(result)
                end = result.get("error") or "{before[reverse_kl]:.3f} -> {after[reverse_kl]:.3f}".format(**result)
                print(f"{laboratory.pair} {start} {arm.label} seed {seed}: {end}", file=sys.stderr, flush=True)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cells and print the tables; 1 if a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", type=Arm.parse, help="see benchmarks/arms.py")
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=PAIRS)
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=STARTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--windows", type=int, default=1, help="steps of an epoch; rollout_ahead needs several")
    parser.add_argument("--out", type=Path, default=Path("runs/laboratory"))
    parser.add_argument("--any-code", action="store_true", help="take cells that other code has run")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    cells = Cells(options.out, code_digest(Path(__file__), Path(toys.__file__)), options.any_code)
    run = dict(steps=options.steps, batch=options.batch, rate=options.rate)
    if options.windows > 1:  # cells of before this option keep their names
        run["windows"] = options.windows
    results = []
    for pair in options.pairs:
        laboratory = replace(Laboratory(pair), models=cache() / "toys")
        results += measure(laboratory, options.arms, options.seeds, options.starts, cells, **run)
    print(f"KL(student || teacher), nats per text, after {options.steps} steps\n\n{show(results)}\n")
    print(show_means(results))
    return int(any("error" in result for result in results))


if __name__ == "__main__":
    sys.exit(main())
