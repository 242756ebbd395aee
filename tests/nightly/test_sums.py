"""The small form of the benchmark of sums: one seed, two objectives, from scratch."""

from __future__ import annotations

from pathlib import Path

import pytest
import sums
from arms import Arm, Cells
from sums import Numbers, Sums


@pytest.mark.nightly
def test_equal_tokenizers_learn_the_sums_and_off_policy_training_ruins_nothing(tmp_path: Path) -> None:
    """The control gains accuracy. Off-policy `bpm` with unlike tokenizers gains bits per byte."""
    task = Sums((68, 76), (30, 36))
    bench = Numbers("finer", task, width=48, layers=2, steps=1500, student_steps=300, models=tmp_path)
    run = dict(steps=100, batch=32, rate=4e-3, count=60)
    cells = Cells(tmp_path / "cells", "code")
    (control,) = sums.measure(bench, [Arm.parse("jsd")], ["on"], [0], cells, **run)
    assert control["after"]["accuracy"] > control["before"]["accuracy"] + 0.1
    assert control["after"]["bits_per_byte"] < control["before"]["bits_per_byte"]
    (unlike,) = sums.measure(bench, [Arm.parse("bpm")], ["off"], [0], cells, **run)
    assert unlike["after"]["bits_per_byte"] < unlike["before"]["bits_per_byte"]
