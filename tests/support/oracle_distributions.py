"""Objectives on whole distributions of the next byte or token, against the truth of toy models."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from support.oracle import bpe_a, bpe_b, letters, next_byte_distribution, unigram
from support.oracle_readings import Claim, Reading, Row, canonical_pair, claims, perfect_pair
from torch import Tensor

from diglot.objectives import RowObjective, SummaryObjective, make_objective
from diglot.objectives.bpm import BPM
from diglot.objectives.byte import ByteDistribution, byte_distribution

PAIRS = ((bpe_a, bpe_b), (bpe_b, bpe_a), (bpe_a, unigram))


def losses(reading: Reading, name: str, **options: Any) -> tuple[Tensor, Tensor]:
    """Values of an objective on a reading, and the student's probability of each one's path, `[R]` each."""
    objective, written = make_objective(name, reading.pair, **options), reading.batch.written
    if isinstance(objective, SummaryObjective):
        plan = objective.plan(written)
        summaries = (
            of(plan)(rows, slice(0, len(rows)))
            for of, rows in ((objective.summary_s, reading.rows_s), (objective.summary_t, reading.rows_t))
        )
        values = objective(*summaries, plan)
        lengths = torch.tensor([len(text) + 1 for text in reading.texts])  # the bytes and stop, in order
        return values.loss, reading.mass.repeat_interleave(lengths)
    assert isinstance(objective, RowObjective)
    rows = objective.rows(written)
    inputs = {**rows.inputs, **objective.extra(rows, written, Teller(reading))}
    values = objective(reading.rows_s[rows.student], reading.rows_t[rows.teacher], **inputs)
    return values.loss, reading.mass[reading.segment_s[rows.student]]


class Teller:
    """What the rows of other positions say."""

    def __init__(self, reading: Reading) -> None:
        self.path, self.rows = reading.path, reading.rows_t
        self.order = torch.from_numpy(reading.pair.need_tables("oracle").teacher.trie.sorted_ids)

    def teacher_logps(self, token: Tensor, ids: Tensor) -> Tensor:
        """Log-probs of `ids` in the rows of `token`, `[Q]`."""
        return self.rows[token, ids]

    def teacher_ranges(self, token: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Log of the teacher's mass on `order[low:high]` in the row of `token`, `[Q]`."""
        ranges = zip(token.tolist(), low.tolist(), high.tolist(), strict=True)
        sums = [self.rows[j, self.order[a:b]].logsumexp(-1) for j, a, b in ranges]
        return torch.stack(sums) if sums else self.rows.new_zeros(0)


def mean(values: Tensor, weight: Tensor) -> float:
    """Over items, weighted."""
    return float((weight * values).sum() / weight.sum())


# ---- byte ------------------------------------------------------------------------------------------------------------


def byte_distributions(reading: Reading) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's next-byte distributions as `byte` has them, the true ones, `[I, 257]`, and the weight of each,
    `[I]`."""
    objective = make_objective("byte", reading.pair)
    assert isinstance(objective, ByteDistribution)
    plan = objective.plan(reading.batch.written)
    columns, _ = byte_distribution(
        objective.summary_t(plan)(reading.rows_t, slice(0, len(reading.rows_t))), plan.teacher
    )
    prefixes = [text[:i] for text in reading.texts for i in range(len(text) + 1)]
    known = {prefix: next_byte_distribution(reading.teacher, prefix) for prefix in dict.fromkeys(prefixes)}
    true = torch.from_numpy(np.stack([known[prefix] for prefix in prefixes]))
    lengths = torch.tensor([len(text) + 1 for text in reading.texts])
    return columns, true, reading.mass.repeat_interleave(lengths)


def byte_rows() -> list[Row]:
    rows = []
    for student, teacher in PAIRS:
        claim = claims("byte", f"{student.__name__} <- {teacher.__name__}")
        for who, make in (("random models", canonical_pair), ("perfect models", perfect_pair)):
            distributions, true, weight = byte_distributions(make(student, teacher))
            distance = 0.5 * (distributions - true).abs().sum(-1)
            rows.append(
                claim(f"{who}: next-byte distribution = the true one", "approximate", mean(distance, weight),
                      "total variation per byte, mean")
            )  # fmt: skip
        rows.append(
            _perfect(claim, perfect_pair(student, teacher), "byte", "nats per byte, mean", beta=0.5, anchor=0.0)
        )
    distributions, true, _ = byte_distributions(canonical_pair(bpe_a, letters))
    claim = claims("byte", "bpe_a <- letters, whose tokens are bytes")
    gap = float((distributions - true).abs().max())
    return [
        *rows,
        claim("next-byte distribution = the true one", "exact", gap, "probability, max"),
        *_same("byte", anchor=0.0),
    ]


# ---- bpm, shared_prefix ----------------------------------------------------------------------------------------------


def bpm_targets(reading: Reading, first_token: str) -> tuple[Tensor, Tensor, Tensor]:
    """The target, and the distribution of the student's next canonical token, over the same cells, `[R, V_s + 2]`;
    weights.

    In a perfect pair the student's row is that distribution: tokens so far and text so far say the same.
    """
    objective = make_objective("bpm", reading.pair, first_token=first_token, skip_blank=False)
    assert isinstance(objective, BPM)
    written = reading.batch.written
    rows = objective.rows(written)
    inputs = {**rows.inputs, **objective.extra(rows, written, Teller(reading))}
    target, reached, _ = objective.target(reading.rows_t[rows.teacher], **inputs)
    true = objective.cells(reading.rows_s[rows.student], reached).exp()
    return target, true, reading.mass[reading.segment_s[rows.student]]


def bpm_rows() -> list[Row]:
    rows = []
    for student, teacher in (*PAIRS, (bpe_a, letters)):
        claim, reading = claims("bpm", f"{student.__name__} <- {teacher.__name__}"), perfect_pair(student, teacher)
        for how in ("greedy", "encode"):
            target, true, weight = bpm_targets(reading, how)
            distance = mean(0.5 * (target - true).abs().sum(-1), weight)
            unit = "total variation per row, mean"
            rows += [
                claim(f"t = distribution of the student's next canonical token ({how})", "approximate", distance, unit),
                _perfect(claim, reading, "bpm", "nats per row, mean", beta=0.5, first_token=how, skip_blank=False),
            ]
    return [*rows, *_same("bpm", "bound", skip_blank=False)]


def shared_prefix_rows() -> list[Row]:
    rows = []
    for student, teacher in PAIRS:
        claim = claims("shared_prefix", f"{student.__name__} <- {teacher.__name__}")
        rows.append(_perfect(claim, perfect_pair(student, teacher), "shared_prefix", "nats per row, mean", beta=0.5))
    return [*rows, *_same("shared_prefix")]


def _same(name: str, kind: str = "exact", **options: Any) -> list[Row]:
    """With one tokenizer on both sides nothing is lost, but for the 1e-8 that `bpm` gives to empty cells."""
    claim, (loss, _) = claims(name, "bpe_a <- bpe_a"), losses(perfect_pair(bpe_a, bpe_a), name, beta=0.5, **options)
    return [claim("a perfect student: loss = 0", kind, float(loss.abs().max()), "nats, max")]


def _perfect(claim: Claim, reading: Reading, name: str, unit: str, **options: Any) -> Row:
    label = ", ".join(f"{key}={value}" for key, value in options.items())
    gap = mean(*losses(reading, name, **options))
    return claim(f"a perfect student: loss = 0 ({label})", "approximate", gap, unit)


LAWS = [byte_rows, bpm_rows, shared_prefix_rows]
