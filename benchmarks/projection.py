"""Process CPU time of one student token's way through `project_teacher_scores`, real tokenizers and texts.

A real small model is the teacher, so that its likeliest ids are what a model's are; `--teacher` SmolLM2 or Gemma 3.
Each text is projected three times: `first`, when nothing is known about the tokenizers' behaviour; `again`, the fastest
of `--repeats`, when all is; and `new`, texts that were not seen before, after all others. The teacher is not counted.

    python benchmarks/projection.py [--teacher smollm2] [--student qwen3] [--top 20] [--texts 12] [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import fetch_model, fetch_texts, load_tokenizer, machine
from transformers import AutoModelForCausalLM

from diglot.engines import Projector, Reading, TeacherScores, score_hidden
from diglot.engines.transcript import Transcript
from diglot.rendering import Renderer

MODELS = {"smollm2": "smollm2-135m-instruct", "gemma3": "gemma-3-270m"}
KINDS = {"passages": ("text",), "code": ("prompt", "solution"), "gsm8k": ("question", "answer")}
_LONGEST = 2000  # letters of a text


def texts(count: int) -> list[str]:
    """Texts of every kind in turn."""
    all_texts: list[str] = []
    for rows in zip(*(fetch_texts(kind, "heldout") for kind in KINDS), strict=False):
        all_texts += [
            "\n".join(row[name] for name in KINDS[kind])[:_LONGEST] for kind, row in zip(KINDS, rows, strict=True)
        ]
    return all_texts[:count]


def scored(projector: Projector, model: Any, text: str, top: int) -> tuple[Reading, TeacherScores]:
    """A text as the only turn, and what the teacher says about its reading."""
    student = projector.student
    ids = [*student.tokenizer(text, add_special_tokens=False)["input_ids"], student.stop_id]
    reading = projector.read(Transcript.of_completion([{"role": "user", "content": "Write."}], ids))
    with torch.no_grad():
        input_ids = torch.from_numpy(reading.teacher_ids)[None]
        states = model(input_ids, output_hidden_states=True).hidden_states[-1][0]
    return reading, score_hidden(states, model.get_output_embeddings(), reading.teacher_ids, top=top)


def seconds(work: Callable[[], Any]) -> float:
    """Of this process on its cores, whatever else runs on the machine."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    """One pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", choices=MODELS, default="smollm2")
    parser.add_argument("--student", default="qwen3", help="a tokenizer of demo/assets.py")
    parser.add_argument("--top", type=int, default=20)
    parser.add_argument("--texts", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    torch.set_num_threads(1)
    folder = fetch_model(MODELS[args.teacher])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sides = (Renderer(load_tokenizer(name), name=name) for name in (args.student, args.teacher))
    projector = Projector(*sides)
    jobs = [scored(projector, model, text, args.top) for text in texts(args.texts)]
    tokens = [len(reading.place_s) for reading, _ in jobs]
    half = len(jobs) // 2

    def project(some: list[tuple[Reading, TeacherScores]], bare: bool = False) -> None:
        for reading, scores in some:
            projector.project(reading, TeacherScores(scores.logps) if bare else scores)

    def each(work: Callable[[], Any], count: int) -> float:
        return round(1e6 * min(seconds(work) for _ in range(args.repeats)) / count, 1)

    first = seconds(lambda: project(jobs[:half]))
    row = {
        "pair": f"{args.teacher} for {args.student}",
        "named": args.top,
        "tokens": sum(tokens),
        "first": round(1e6 * first / sum(tokens[:half]), 1),
        "new": round(1e6 * seconds(lambda: project(jobs[half:])) / sum(tokens[half:]), 1),
        "again": each(lambda: project(jobs), sum(tokens)),
        "log-probs alone": each(lambda: project(jobs, bare=True), sum(tokens)),
    }
    print(json.dumps({"µs a student token": row, "machine": machine()}, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
