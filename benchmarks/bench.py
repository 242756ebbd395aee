"""The benchmark suite: one table per question, ratios last, and all numbers in runs/bench/summary.json.

    python benchmarks/bench.py [--only loss_stage step alignment memory on_policy] [--repeats 3]

Ends with an error if the two sides of a comparison did not work on the same texts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grouping
import loss_stage
import memory
import on_policy
import step
import torch
from cases import Case, demo_case, random_case, real_renderer, whole_texts
from measure import BenchError, demo_trainer, fetch_model, machine, table
from transformers import AutoTokenizer

from diglot.rendering import Renderer

SEED = 0
TARGETS = {
    "loss_stage": "strict >= 5, <= 0.20; bpm >= 3, <= 0.20; gold >= 2, <= 0.33",
    "step": "covering, strict, span <= 1.15; bpm, byte <= 1.30",
    "memory": "<= 1.10",
    "on_policy": ">= 0.95",
}


def run_loss_stage(repeats: int) -> dict[str, Any]:
    """Both pairs against TRL's GOLD."""
    sizes = {"llama3": 128_256, "qwen3": 151_936}
    by_case = {}
    for make in (
        lambda: demo_case(16),
        lambda: random_case(
            "llama3-qwen3",
            (real_renderer("llama3", sizes["llama3"]), real_renderer("qwen3", sizes["qwen3"])),
            whole_texts(),
            1000,
            (1024, 1024),
            SEED,
        ),
    ):
        case: Case = make()
        forms = ["hybrid", "sorted"] + (["hybrid by position"] if case.name == "smollm2-gemma3" else [])
        by_case[case.name] = show_loss_stage(case, loss_stage.compare(case, repeats, ["strict", "bpm", "gold"], forms))
        del case
    return by_case


def show_loss_stage(case: Case, result: dict[str, Any]) -> dict[str, Any]:
    """Print a pair's table; the summary of our objectives, and the details of all sides."""
    sides, batch = result["sides"], case.batch()
    print(
        f"\nLoss stage, {case.name}: {case.pair.size_s} x {case.pair.size_t} columns, {result['texts']} texts, "
        f"{len(batch.student.rows)} student and {len(batch.teacher.rows)} teacher tokens scored, of "
        f"{batch.student.input_ids.numel()} and {batch.teacher.input_ids.numel()} positions"
    )
    for note in result["notes"]:
        print(note)
    names = ("items", "seconds", "peak_mib", "speedup_low", "speedup_high", "speedup", "memory_ratio")
    print(table(("side", *names), ((side, *map(row.get, names)) for side, row in sides.items())))
    ours = {side.removeprefix("ours "): row for side, row in sides.items() if side.startswith("ours ")}
    return {**ours, "trl": {side: row for side, row in sides.items() if side not in ours and side.startswith("trl")}}


def run_step(repeats: int) -> dict[str, Any]:
    """The demo pair's whole step."""
    trainer = demo_trainer("strict", 16 * (repeats + 1), log_rollouts=0)
    rows = step.compare(trainer, list(step.OBJECTIVES), repeats)
    names = (
        *("scored", "floor_seconds", "step_seconds", "reading_share"),
        *("ratio_low", "ratio_high", "ratio", "cpu_low", "cpu_high", "cpu_ratio"),
    )
    print("\nStep without generation against both models alone, demo pair, 16 rows")
    print(table(("objective", *names), ((name, *map(row.get, names)) for name, row in rows.items())))
    return rows


def run_alignment(repeats: int) -> dict[str, Any]:
    """Real text cut by two real tokenizers."""
    renderers = real_renderer("llama3"), real_renderer("qwen3")
    texts = [row["completion"] for row in whole_texts()]
    whole = " ".join(texts)
    long = [whole[at : at + 95_000] for at in (0, 95_000)]  # about 20,000 tokens each
    kinds: dict[str, Sequence[str]] = {"long texts": long, "short texts": texts}
    rows: dict[str, Any] = {}
    streams = {}
    for kind, of_kind in kinds.items():
        streams[kind] = grouping.stream(renderers[0], of_kind), grouping.stream(renderers[1], of_kind)
        rows[kind] = grouping.compare(streams[kind], len(of_kind), repeats)
    names = ("texts", "tokens", "tokens_t", "trl_seconds", "seconds", "speedup_low", "speedup_high", "speedup")
    print("\nAlignment against TRL's grouping")
    print(table(("texts of", *names), ((kind, *map(row.get, names)) for kind, row in rows.items())))
    sizes = (10_000, 100_000, 1_000_000, 10_000_000)
    first = [side_of(side, 220) for side in streams["short texts"]]
    growth = grouping.growth((first[0], first[1]), 220, sizes)
    print(table(("student tokens", "seconds per million"), growth.items()))
    worst = min(row["speedup"] for row in rows.values())
    return {**rows, "growth": growth, "speedup": worst, "seconds_per_million": max(growth.values())}


def side_of(side: Any, segments: int) -> Any:
    """The first segments of a stream."""
    inside = side.segment < segments
    return type(side)(side.end[inside], side.segment[inside], side.exact[inside], side.stop[inside])


def run_memory(repeats: int) -> dict[str, Any]:
    """Peak memory of the loss stage from 256 to 8,192 rows."""
    student = AutoTokenizer.from_pretrained(fetch_model("smollm2-135m-instruct"))
    renderers = Renderer(student, num_embeddings=49_152, name="smollm2"), real_renderer("qwen3", 151_936)
    texts, rows = whole_texts(), (256, 1024, 8192)
    peaks = memory.flatness(
        lambda n: random_case("memory", renderers, texts, n, (256, 256), SEED), rows, ["strict", "bpm", "gold"], 64
    )
    print("\nPeak memory of the loss stage without hidden states, MiB, 64 rows of logits at a time, 49152 x 151936")
    lines = ((name, *(row["peak_mib"][n] for n in rows), row["flatness"]) for name, row in peaks.items())
    print(table(("objective", *(f"{n} rows" for n in rows), "flatness"), lines))
    return peaks


def run_on_policy(repeats: int) -> dict[str, Any]:
    """Sampling of the demo's student."""
    trainer = demo_trainer("strict", 16, lmbda=1.0, max_completion_length=64)
    rates = on_policy.compare(trainer, repeats)
    names = list(rates)
    print("\nSampling against plain generate, demo student, 16 prompts")
    print(table(("tokens/s", *names), [("sampler", *rates.values())]))
    return rates


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "loss_stage": run_loss_stage,
    "step": run_step,
    "alignment": run_alignment,
    "memory": run_memory,
    "on_policy": run_on_policy,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for; 1 if a comparison was none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args(arguments)
    torch.manual_seed(SEED)
    print(f"{machine()}\nseed {SEED}, {options.repeats} rounds, medians", flush=True)
    path = options.out / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {}
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        try:
            result = PARTS[name](options.repeats)
        except BenchError as error:
            print(f"\nbench: {name}: {error}", file=sys.stderr)
            return 1
        summary[name] = result
        if name == "memory":
            summary["memory_flatness"] = max(row["flatness"] for row in result.values())
        if name in TARGETS:
            print(f"target: {TARGETS[name]}")
        summary["machine"] = machine()
        path.write_text(json.dumps(summary, indent=1) + "\n")
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
