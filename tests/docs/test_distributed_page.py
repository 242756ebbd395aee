"""The tables of docs/distributed.md are those of their formulas."""

from __future__ import annotations

from pathlib import Path

import pytest
import sizing

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "distributed.md").read_text(encoding="utf-8")


def test_the_sizing_tables_are_those_of_the_formulas() -> None:
    """Whoever changes a formula prints the tables again: `python benchmarks/sizing.py`."""
    assert sizing.memory_table() in PAGE
    assert sizing.wire_table() in PAGE


def test_a_formula_by_hand() -> None:
    """8B over 16 GPUs: 16 bytes a parameter, sharded; two gathered layers, the head twice; kept states; a block."""
    plan = sizing.PLANS[1]
    head = 4096 * 128_256
    by_hand = 8e9 + 4 * (8e9 - 2 * head) / 32 + 4 * head + 2 * 16_384 * 4096 * 32 + 2**30
    assert sizing.student_bytes(plan) == pytest.approx(by_hand)
    assert sizing.wire_bytes(plan.teacher)["hidden"] == 16_384
