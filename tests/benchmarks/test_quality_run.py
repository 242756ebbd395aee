"""The testbed's runner: killed runs go on, pairs without head-room are refused, and rates follow one rule."""

from __future__ import annotations

import importlib
import json
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
import yaml
from support.stand_in_models import save_model, write_rows

importlib.import_module("quality")
from quality import runner, training  # noqa: E402
from quality.__main__ import main  # noqa: E402
from quality.declaration import PairDeclaration, read  # noqa: E402
from quality.runner import ArmError, Plan, no_headroom  # noqa: E402
from quality.table import show  # noqa: E402

from diglot.errors import StoppedError  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
COVERING = {"default": "covering", "arms": {"covering": "covering"}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Models and texts of a test are its own."""
    place = tmp_path / "cache"
    monkeypatch.setenv("DIGLOT_CACHE", str(place))
    monkeypatch.setattr(runner, "_OPEN", {})
    write_rows(place)
    return place


def two_cells(**pair: Any) -> dict[str, Any]:
    """One arm with one rate and one seed: a cell that chooses and a cell that counts."""
    laboratory = {
        "kind": "laboratory",
        "options": {"pair": "equal", "fit_steps": 30},
        "budget": {"steps": 15, "batch": 8, "items": 4},
        "rates": [0.002],
        "headroom": 0.001,
    }
    return {
        "name": "two",
        "seeds": [0],
        "selection": {"seed": 9, "by": "reverse_kl"},
        "default": "jsd",
        "arms": {"jsd": "jsd"},
        "pairs": {"pair": {**laboratory, **pair}},
    }


def cell(value: float, spread: float = 0.0, unit: str = "nats per byte") -> dict[str, Any]:
    top = [value - spread, value, value + spread]
    return {"value": value, "unit": unit, "top": top, "bottom": [1.0] * 3}


def stages(folder: Path) -> dict[str, Path]:
    paths = (folder / "cells").glob("*.json")
    return {json.loads(path.read_text())["stage"]: path for path in paths}


def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = tmp_path / "two.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(two_cells()))
    words = ["run", str(file), "--out", str(out)]
    started = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.quality", *words],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 300
        while "selection" not in stages(out / "two") and time.monotonic() < end and started.poll() is None:
            time.sleep(0.02)
    finally:
        started.send_signal(signal.SIGKILL)
        started.wait()
    before = stages(out / "two")
    assert set(before) == {"headroom", "selection"}
    bytes_before = {name: path.read_bytes() for name, path in before.items()}
    assert main(["table", str(file), "--out", str(out)]) == 1  # not run yet, and a table runs nothing
    assert set(stages(out / "two")) == {"headroom", "selection"}

    seeds = []
    train = training.train
    monkeypatch.setattr(training, "train", lambda *args: seeds.append(args[-1]) or train(*args))
    assert main(words) == 0
    after = stages(out / "two")
    assert seeds == [0] and set(after) == {"headroom", "selection", "test"}
    assert {name: after[name].read_bytes() for name in before} == bytes_before
    assert main(words) == 0 and seeds == [0]
    table = (out / "two" / "table.md").read_text()
    assert "| `jsd` | 0.002 |" in table and (out / "two" / "two-pair.svg").exists()


@pytest.mark.parametrize("stage", ["headroom", "rate"])
def test_a_signal_in_a_cell_ends_the_table(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise StoppedError("Stopped by SIGTERM after step 3.", 143)

    (file := tmp_path / "two.yaml").write_text(yaml.safe_dump(two_cells()))
    monkeypatch.setattr(Plan, stage, stopped)
    with pytest.raises(StoppedError):
        main(["run", str(file), "--out", str(tmp_path / "out")])
    again = pickle.loads(pickle.dumps(StoppedError("as a worker's process hands it on", 143)))
    assert (str(again), again.code) == ("as a worker's process hands it on", 143)


def test_a_pair_without_headroom_is_refused_and_nothing_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher is the student itself."""
    model = str(save_model(tmp_path / "model", zoo.chatml(), 0, 0.3))
    options = {"student": model, "teacher": model, "task": "prose", "length": 8, "pool": 4}
    values = two_cells(kind="models", options=options, budget={"steps": 1, "batch": 2, "items": 4})
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(values))
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("trained"))
    assert main(["run", str(file), "--out", str(tmp_path / "out")]) == 1
    assert "Refused: the student is 0.000" in capsys.readouterr().out
    assert set(stages(tmp_path / "out" / "two")) == {"headroom"}


def test_sums_are_a_pair_that_is_measured_and_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher this small has learnt nothing, so that it does is not asked here."""
    sums = importlib.import_module("sums")
    monkeypatch.setattr(sums.Numbers, "teacher", lambda bench, control: (bench.model(not control, right=True), None))
    monkeypatch.setattr(runner, "no_headroom", lambda *_: None)
    sizes = {"width": 16, "layers": 1, "steps": 2, "student_steps": 1}
    options = {"direction": "finer", "sizes": sizes, "task": {"first": [40, 60], "things": ["apples"]}}
    budget = {"steps": 1, "batch": 2, "items": 8}
    plan = Plan(read(two_cells(kind="sums", options=options, budget=budget) | COVERING), tmp_path)
    [result] = runner.run_all(plan)
    assert result.refused is None
    [arm] = result.arms
    assert arm.error is None
    after = arm.cells[0]["after"]
    assert set(after) >= {"reverse_kl", "bits_per_byte", "digits_bits_per_byte", "accuracy"}
    assert len(after["bits_per_byte"]["top"]) == 8 and after["accuracy"]["value"] == 0.0


def test_a_pair_that_cannot_be_measured_is_not_called_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plan, "headroom", lambda *_: 1 / 0)
    plan = Plan(read(two_cells()), tmp_path)
    shown = show(plan.declaration, runner.run_all(plan))
    assert "Could not be measured: ZeroDivisionError: division by zero." in shown and "efused" not in shown


def test_headroom_is_a_distance_beyond_noise_and_a_teacher_that_is_better_at_something() -> None:
    near = {"before": {"reverse_kl": cell(0.3, 0.6)}, "teacher": {}}
    assert "needed: 0.01" in str(no_headroom(near, 0.01))
    bits = {
        "before": {"reverse_kl": cell(0.3, 0.1), "bits_per_byte": cell(0.9)},
        "teacher": {"bits_per_byte": cell(1.0)},
    }
    assert "teacher is not better than the student: bits per byte 1.000 against 0.900" in str(no_headroom(bits, 0.01))
    bits["teacher"] = {"bits_per_byte": cell(0.8)}
    assert no_headroom(bits, 0.01) is None
    answers = {**bits["before"], "accuracy": cell(0.2)}
    both = {"before": answers, "teacher": {"bits_per_byte": cell(1.0), "accuracy": cell(0.6)}}
    assert no_headroom(both, 0.01) is None


@pytest.mark.parametrize(
    ("ends", "chosen"),
    [
        ({0.1: 3.0, 0.2: 1.0, 0.4: 2.0}, 0.2),
        ({0.1: 1.0, 0.2: 1.0, 0.4: 2.0}, 0.1),
        ({0.1: float("nan"), 0.2: float("inf"), 0.4: 9.0}, 0.4),
    ],
)
def test_the_rate_is_the_best_on_validation_and_the_smaller_of_equals(
    ends: dict[float, float], chosen: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, pair, calls = planned(tmp_path, ends, monkeypatch)
    assert plan.rate(pair, "jsd") == chosen
    assert {(seed, stage) for _, seed, stage in calls} == {(9, "selection")}


def test_an_arm_that_ends_nowhere_finite_has_no_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, pair, _ = planned(tmp_path, {0.1: float("nan"), 0.2: float("inf")}, monkeypatch)
    with pytest.raises(ArmError, match=r"no rate of .* ends with a finite reverse KL on pair"):
        plan.rate(pair, "jsd")
    failed = runner.run_arm(plan, pair, "jsd")
    assert failed.cells == () and str(failed.error).startswith("ArmError: no rate")


def planned(
    tmp_path: Path, ends: dict[float, float], monkeypatch: pytest.MonkeyPatch
) -> tuple[Plan, PairDeclaration, list[tuple[float, int, str]]]:
    """A plan whose runs end with these values."""
    declaration = read(two_cells(rates=list(ends)))
    calls: list[tuple[float, int, str]] = []

    def run(self: Plan, pair: PairDeclaration, label: str, rate: float, seed: int, stage: str) -> dict[str, Any]:
        calls.append((rate, seed, stage))
        return {"after": {"reverse_kl": cell(ends[rate])}}

    monkeypatch.setattr(Plan, "run", run)
    return Plan(declaration, tmp_path), declaration.pairs["pair"], calls


def test_command_lines_that_cannot_be_run_end_with_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path)]
    assert main(["run", "nothing", *out]) == 2 and "the tiers are ci, cpu, exact, gpu, smoke" in capsys.readouterr().err
    assert main(["run", "ci", "--arms", "nobody", *out]) == 2
    assert "There is no arm nobody; known are covering" in capsys.readouterr().err
    assert list(tmp_path.glob("*.md")) == []


def test_options_that_a_kind_of_pair_does_not_have_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "two.yaml"
    for options, message in (({"pare": "equal"}, "pare"), ({"pair": "same"}, "option pair 'same' is not one of finer")):
        file.write_text(yaml.safe_dump(two_cells(options=options)))
        assert main(["run", str(file), "--out", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
