"""Does the peak memory of the loss stage grow with the number of rows?

Random heads and small hidden states, a fixed number of rows of logits at a time. Growth is counted from the level at
which hidden states and heads are there already. What else grows with the rows is taken off: the stage's copy of
their hidden states on both sides and the student's gradient.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from cases import Case
from loss_stage import Worker


def peak(case: Case, objective: str, chunk_rows: int) -> tuple[float, int]:
    """Bytes at the highest point of one stage above its start, and bytes of hidden states among them."""
    batch = case.batch()
    leaf, rows_s, rows_t = case.student.hidden, len(batch.student.rows), len(batch.teacher.rows)
    # Of the student: the rows that are read, their gradient, and the gradient of all positions.
    of_student = (2 * rows_s * leaf.shape[-1] + leaf.numel()) * leaf.element_size()
    of_teacher = rows_t * case.teacher.hidden.shape[-1] * case.teacher.hidden.element_size()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(case, path := Path(folder) / "case.pt")
        worker = Worker(path, "ours", objective, chunk_rows)
        try:
            worker()
        finally:
            worker.close()
    return worker.peak, of_student + of_teacher


def flatness(
    make: Callable[[int], Case], rows: Sequence[int], objectives: Sequence[str], chunk_rows: int
) -> dict[str, Any]:
    """Peak at every number of rows, less the hidden states; last over first."""
    cases = {n: make(n) for n in rows}
    by_objective: dict[str, Any] = {}
    for name in objectives:
        peaks = {n: peak(case, name, chunk_rows) for n, case in cases.items()}
        above = {n: (whole - hidden) / 2**20 for n, (whole, hidden) in peaks.items()}
        by_objective[name] = {
            "peak_mib": above,
            "hidden_mib": {n: hidden / 2**20 for n, (_, hidden) in peaks.items()},
            "flatness": above[rows[-1]] / above[rows[0]],
        }
    return by_objective
