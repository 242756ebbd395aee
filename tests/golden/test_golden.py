"""The demo pair's trajectories are the committed ones."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.beside import load_beside

record: Any = load_beside(__file__, "record")


@pytest.mark.real
@pytest.mark.parametrize("kind", record.KINDS)
def test_the_trajectory_of_the_demo_pair_is_the_recorded_one(kind: str, tmp_path: Path) -> None:
    """To 1e-3: other processors add in another order, and what is sampled hangs on the last bit."""
    expected = json.loads(record.path(kind).read_text(encoding="utf-8"))["steps"]
    result = record.trajectory(kind, tmp_path)
    assert len(expected) == len(result) == 5
    for step, (old, new) in enumerate(zip(expected, result, strict=True)):
        assert old.keys() <= new.keys()  # what is logged may grow
        for name in old:
            assert new[name] == pytest.approx(old[name], rel=1e-3, abs=1e-6), (step, name)


def test_nothing_is_recorded_from_a_tree_that_is_not_clean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=x", "-c", "user.email=x@localhost"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "a")
    assert record.changed_files(tmp_path) == []
    (tmp_path / "a").write_text("2")
    before = {kind: record.path(kind).read_bytes() for kind in record.KINDS}
    assert record.record(tmp_path) == 1 and "a" in capsys.readouterr().err
    assert before == {kind: record.path(kind).read_bytes() for kind in record.KINDS}
