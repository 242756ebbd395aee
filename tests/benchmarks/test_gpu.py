"""The benchmark of a card runs, without one too, and says so where one is missing."""

from __future__ import annotations

import json
from pathlib import Path

import gpu
import pytest
import torch

SMALL = ["--rows", "40", "--hidden", "8", "--vocabularies", "300", "320", "--repeats", "1"]


def test_it_measures_both_comparisons_and_keeps_what_was_run(tmp_path: Path) -> None:
    assert gpu.main(["--device", "cpu", *SMALL, "--out", str(tmp_path / "deep" / "gpu.json")]) == 0
    record = json.loads((tmp_path / "deep" / "gpu.json").read_text())
    assert record["card"] == "CPU" and record["rows"] == 40 and "--vocabularies" in record["command"]
    for name in ("jsd", "cells"):  # without a card the time says nothing, not even that a share is below 1
        of_stage = 2 * 40 * 8 * (3 * 300 + 320) / record[name]["seconds"]
        assert (
            record[name]["share"] == pytest.approx(of_stage / record["operations_per_second"], rel=1e-12)
            and of_stage > 0
        )


def test_its_stage_gives_both_gradients() -> None:
    stage = gpu.Stage("cpu", 12, 8, (300, 320))
    results = []
    stage.hidden_s.register_hook(lambda g: results.append(g.clone()))
    stage.weights[0].weight.register_hook(lambda g: results.append(g.clone()))
    for compare in (stage.jsd, stage.cells):
        results.clear()
        stage.run(compare)
        assert len(results) == 2 and all(g.isfinite().all() and g.abs().sum() > 0 for g in results)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so(capsys: pytest.CaptureFixture) -> None:
    assert gpu.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().err
