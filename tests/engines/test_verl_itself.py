"""The plug-in inside verl 0.9.1's own code, as far as it runs without GPUs and servers of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERL = ROOT / ".venv" / "verl"


@pytest.mark.nightly
def test_verls_own_manager_and_loss_take_the_teachers_numbers() -> None:
    if not (VERL / "verl").exists():
        pytest.fail(f"verl is not in {VERL}. Run `make nightly`, which installs it there.")
    script = ROOT / "tests" / "support" / "verl_itself.py"
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("src", "tests"))
    done = subprocess.run(
        [sys.executable, str(script), str(VERL)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    record = json.loads(done.stdout.splitlines()[-1])
    rows, first = record["expected"], record["first"]
    assert record["following"] and record["rows"] == pytest.approx(rows, abs=2e-4)
    assert record["loss"] == pytest.approx(sum(-1.5 - row for row in rows) / len(rows), abs=2e-4)
    assert record["gradient"] == [0.0] * first + [pytest.approx(1 / len(rows))] * len(rows) + [0.0]
    assert "distillation/coverage" in record["metrics"]
