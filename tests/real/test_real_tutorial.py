"""The tutorial as a person would type it, with the real models and fewer steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.real_assets import model_folder
from support.tutorial_page import ROOT, steps

pytestmark = pytest.mark.real


def script() -> str:
    """One script of all steps, without what makes the environment that this test runs in."""
    parts = ["set -euo pipefail"]
    for language, text in steps():
        lines = [line for line in text.splitlines() if not line.startswith(("make install", "source "))]
        body = "\n".join(lines).replace(".venv/bin/python demo", f"{sys.executable} {ROOT}/demo")
        parts.append(body if language == "bash" else f"{sys.executable} - <<'END'\n{body}\nEND")
    return "\n".join(parts).replace("\ndiglot ", f"\n{sys.executable} -m diglot ")


def test_the_tutorial_on_the_real_pair(tmp_path: Path) -> None:
    """It holds for the pair what the page says: the verdict, coverage near one, and a student that loads."""
    folder = model_folder("gemma-3-270m").parents[1]
    text = script().replace("~/.cache/diglot", str(folder))
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "160"}
    done = subprocess.run(["bash", "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "this pair can be trained; start with objective covering" in " ".join(done.stdout.split())
    lines = (tmp_path / "runs/tutorial/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    coverage = [record["align/coverage"] for record in metrics if "align/coverage" in record]
    assert len(coverage) == 2 and min(coverage) > 0.95
    assert "The river" in done.stdout[-400:]
