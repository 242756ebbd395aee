"""A save is all or nothing, whatever kills it; what was whole before stays, and the run goes on exactly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import kills


def run(tmp_path: Path, *what: str, limit: float = 280) -> dict[str, Any]:
    command = [sys.executable, kills.__file__, str(tmp_path), *what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def killed_at_every_write(reached: dict[str, list[int]]) -> None:
    for steps in (reached["plain"], reached["power"]):
        assert len(steps) > 30  # writes of one save
        assert steps == sorted(steps) and set(steps) == {1, 2}  # the old checkpoint until the new one is whole


@pytest.mark.real
def test_a_save_that_ends_at_any_write_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    """Also after a power cut that tears every file that was not flushed, and with save_total_limit=1."""
    killed_at_every_write(run(tmp_path, "gkd", "enumerate"))


@pytest.mark.real
def test_sigterm_saves_and_the_resumed_run_is_exact(tmp_path: Path) -> None:
    outcome = run(tmp_path, "minillm", "sigterm")
    assert outcome["code"] == 143 and outcome["exact"] and 2 <= outcome["step"] < kills.STEPS


@pytest.mark.real
def test_a_few_kills_lose_nothing(tmp_path: Path) -> None:
    outcome = run(tmp_path, "gkd", "sigkill", "8")
    assert len(outcome["reached"]) >= 8 and outcome["exact"] and all(outcome["exact"])


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["gkd", "minillm"])
def test_fifty_kills_lose_nothing(kind: str, tmp_path: Path) -> None:
    """At random moments (seed in tests/support/kills.py); some fall into a save."""
    outcome = run(tmp_path, kind, "sigkill", "50", limit=3000)
    assert len(outcome["reached"]) >= 50 and outcome["in_a_save"] > 0 and all(outcome["exact"])


@pytest.mark.nightly
def test_rollouts_and_their_checkpoint_are_saved_together(tmp_path: Path) -> None:
    killed_at_every_write(run(tmp_path, "minillm", "enumerate", limit=600))
