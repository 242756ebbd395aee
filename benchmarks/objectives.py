"""Every objective on one real batch of the demo pair: seconds and peak memory of the loss stage, forward and backward.

Hidden states are computed once; what is timed is what the objective adds: reading the heads, the values, the gradient
of hidden states and head. Each row is the median of `--repeats` rounds over all objectives, so that noise of the
machine falls on all of them.

A second table says in which direction each objective pulls. There the two models have one tokenizer: the teacher, and
as student the same weights with noise added. The path of unlike vocabularies is taken, and the gradient of the
student's hidden states is compared with that of the whole JSD on equal vocabularies, at the same beta: 1 means the same
direction.

    python benchmarks/objectives.py [--rows 16] [--repeats 3] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from typing import Any

import torch
from measure import PeakMemory, demo_trainer, fetch_model, machine, prepared_batch, rows_of_text, term_for
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from diglot import GKDConfig, GKDTrainer
from diglot.comparisons import Term, scores_of
from diglot.objectives import OBJECTIVES


def loss_stage(trainer: GKDTrainer, term: Term, hidden: Tensor, batch: Any) -> tuple[float, Tensor]:
    """Value and gradient of the hidden states; the head's gradient is computed as well, and dropped."""
    leaf = hidden.detach().requires_grad_()
    view, objective = batch.views[0], term.objective
    plan = objective.plan(view.read.written)
    loss, _ = objective.loss(plan, scores_of(batch, view, leaf, trainer.student_head), 1.0 / max(plan.items, 1))
    loss.backward()
    trainer.model.zero_grad(set_to_none=True)
    return float(loss.detach()), leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)


def costs(rows: int, repeats: int, names: list[str]) -> dict[str, dict[str, float]]:
    """Seconds and memory of each objective on the demo pair."""
    trainer = demo_trainer("strict", rows)
    batch = prepared_batch(trainer)
    with torch.no_grad():
        hidden = trainer.hidden_at_rows(trainer.model, batch.student)
    view = batch.views[0]
    states = view.answers.hidden  # computed before anything is timed
    terms = {name: term_for(trainer, name) for name in names if name != "jsd"}
    print(f"{machine()}\n{rows} rows of text, {len(hidden)} student and {len(states)} teacher tokens scored")
    seconds: dict[str, list[float]] = {name: [] for name in terms}
    by_objective: dict[str, dict[str, float]] = {}
    for turn in range(repeats + 1):
        for name in list(terms)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            with PeakMemory() as memory:
                value, _ = loss_stage(trainer, terms[name], hidden, batch)
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
            by_objective[name] = {
                "loss": value,
                "items": float(terms[name].objective.plan(view.read.written).items),
                "peak_mib": memory.bytes / 2**20,
            }
    for name, values in seconds.items():
        by_objective[name]["seconds"] = statistics.median(values)
    return by_objective


def noisy_pair(rows: int) -> GKDTrainer:
    """Two models with one tokenizer that read by the general path: the student is the teacher with noise."""
    folder = fetch_model("smollm2-135m-instruct")
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    student = copy.deepcopy(teacher)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn(p.shape, generator=draw) * 0.1 * p.std())
    args = GKDConfig(
        output_dir="runs/bench", lmbda=0.0, use_cpu=True, per_device_train_batch_size=rows, vocabulary_path="general"
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    from datasets import Dataset

    data = Dataset.from_list(rows_of_text(rows))
    return GKDTrainer(
        student, teacher, args, train_dataset=data, processing_class=tokenizer, teacher_processing_class=tokenizer
    )


def directions(rows: int, names: list[str]) -> dict[str, float]:
    """Cosine of each objective's gradient to that of the whole JSD with the same beta (1 where it has none)."""
    trainer = noisy_pair(rows)
    batch = prepared_batch(trainer)
    with torch.no_grad():
        hidden = trainer.hidden_at_rows(trainer.model, batch.student)
    references: dict[float, Tensor] = {}
    cosines = {}
    for name in names:
        term = term_for(trainer, name)
        beta = float(getattr(term.objective, "beta", 1.0))
        if beta not in references:
            _, references[beta] = loss_stage(trainer, term_for(trainer, "jsd", beta=beta), hidden, batch)
        gradient = loss_stage(trainer, term, hidden, batch)[1]
        cosines[name] = float(torch.nn.functional.cosine_similarity(gradient.ravel(), references[beta].ravel(), dim=0))
    return cosines


def main() -> None:
    """Print both tables, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=sorted(OBJECTIVES), choices=sorted(OBJECTIVES))
    options = parser.parse_args()
    rows = costs(options.rows, options.repeats, options.only)
    cosines = directions(min(options.rows, 4), options.only)
    print(f"{'objective':14s} {'items':>7s} {'loss':>10s} {'seconds':>8s} {'peak MiB':>9s} {'cosine':>7s}")
    for name in sorted({*rows, *cosines}, key=lambda n: rows.get(n, {}).get("seconds", 0.0)):
        row = rows.get(name)
        of_pair = (
            f"{row['items']:7.0f} {row['loss']:10.4f} {row['seconds']:8.3f} {row['peak_mib']:9.0f}" if row else " " * 37
        )
        print(f"{name:14s} {of_pair} {cosines[name]:7.3f}")
    print(json.dumps({"objectives": rows, "cosines": cosines}))


if __name__ == "__main__":
    main()
