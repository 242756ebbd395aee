"""Sampling as our trainers do it against plain `generate` of `transformers`, and its share of an on-policy step."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from measure import alternate, check_same
from numpy.typing import NDArray

from diglot import GKDTrainer
from diglot.rollouts.sampler import pad_left

Ids = NDArray[np.int64]


def plain(trainer: GKDTrainer, prompts: list[Ids], seed: int) -> list[list[int]]:
    """What a user would write with `generate` alone: pad, seed, generate, cut."""
    args, stops = trainer.args, trainer.student_renderer.stop_ids
    pad = trainer.sampler.pad_id
    ids, mask = pad_left(prompts, pad, args.device)
    torch.manual_seed(seed)
    trainer.student.eval()
    with torch.no_grad():
        out = trainer.student.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            repetition_penalty=1.0,
            max_new_tokens=args.max_completion_length,
            eos_token_id=list(stops),
            pad_token_id=pad,
        )
    trainer.student.train()
    return [_until_stop(row, stops) for row in out[:, ids.shape[1] :].tolist()]


def _until_stop(row: list[int], stops: tuple[int, ...]) -> list[int]:
    end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
    return row[:end]


def compare(trainer: GKDTrainer, repeats: int) -> dict[str, Any]:
    """Tokens per second of both with the same prompts, settings and seed, so that both write the same tokens."""
    data: Any = trainer.train_dataset
    samples = trainer.data_collator([data[i] for i in range(len(data))])["samples"]
    conversations = [sample.conversation for sample in samples]
    prompts = [trainer.student_renderer.prompt_ids(c) for c in conversations]
    seed, seeds = trainer.seed_for("rollouts"), trainer.row_seeds("rollouts", [prompts])[0]
    written: dict[str, list[list[int]]] = {}

    def ours() -> None:
        written["ours"] = [row.tolist() for row in trainer.sample(conversations, prompts, seeds)]

    def theirs() -> None:
        written["plain"] = plain(trainer, prompts, seed)

    timing = alternate({"ours": ours, "plain": theirs}, repeats)
    # Ours draws each row from a generator of its own, so the texts differ: each side's own tokens are counted.
    tokens, of_plain = (sum(map(len, written[name])) for name in ("ours", "plain"))
    gain = tokens / of_plain
    low, high = timing.spread("plain", "ours")
    return {
        "completions": len(prompts),
        "tokens": tokens,
        "plain_tokens_per_second": of_plain / timing.median("plain"),
        "tokens_per_second": tokens / timing.median("ours"),
        "generation_share": timing.median("ours") / _step_seconds(trainer),
        "throughput_ratio": gain * timing.ratio("plain", "ours"),
        "throughput_low": gain * low,
        "throughput_high": gain * high,
    }


def _step_seconds(trainer: GKDTrainer) -> float:
    """One whole on-policy step: sample, read, align, both models, loss, backward, optimizer."""
    data: Any = trainer.train_dataset
    samples = trainer.data_collator([data[i] for i in range(len(data))])
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=0.0)
    start = time.perf_counter()
    (inputs,), _ = trainer.get_batch_samples(iter([samples]), 1, trainer.args.device)
    trainer.compute_loss(trainer.model, inputs).backward()
    optimizer.step()
    seconds = time.perf_counter() - start
    trainer.model.zero_grad(set_to_none=True)
    check_same("is the step on-policy", expected=True, step=inputs["batch"].on_policy)
    return seconds
