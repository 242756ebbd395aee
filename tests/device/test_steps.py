"""Training and evaluation on a device that refuses what CUDA refuses, and how often the host waits for it.

Not a GPU: see `support.standin`. The tests marked `cuda` run where there is one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
import torch
from support import tiny

from diglot.objectives import OBJECTIVES

TESTS = Path(__file__).resolve().parents[1]
OTHERS = [
    "gkd-data", "gkd-generations", "gkd-observed", "gkd-beside", "gkd-beside-bpm", "gkd-split", "minillm",
    "minillm-bpm", "minillm-beside", "minillm-same", "evaluate",
]  # fmt: skip
BUDGET = 5
"""Waits per micro-batch for the loss, its backward pass aside."""
MORE = {"gkd-bpm": 10, "gkd-byte": 10, "gkd-escd": 27, "minillm-bpm": 15, "gkd-generations": 80}
"""Budgets of what does not keep to it yet. They only ever go down."""


@pytest.fixture(scope="session")
def done() -> dict[str, dict[str, Any]]:
    """What each case gave, from one process: the stand-in changes torch for as long as that lives."""
    path = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "support.standin_run"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    found = [json.loads(line[5:]) for line in run.stdout.splitlines() if line.startswith("CASE ")]
    assert found, run.stderr[-3000:]
    return {one["case"]: one for one in found}


@pytest.mark.parametrize("case", [*(f"gkd-{name}" for name in OBJECTIVES), *OTHERS])
def test_every_tensor_is_where_its_operation_is(case: str, done: dict[str, dict[str, Any]]) -> None:
    assert "error" not in done[case], done[case]["error"]
    values = done[case]["values"]
    assert values and all(0 < value < 100 for value in values)


@pytest.mark.parametrize(
    "case", [*(f"gkd-{name}" for name in OBJECTIVES), "gkd-data", "gkd-generations", "minillm", "minillm-bpm"]
)
def test_the_host_waits_no_more_often_than_allowed(case: str, done: dict[str, dict[str, Any]]) -> None:
    assert done[case]["waits"]["loss"] <= MORE.get(case, BUDGET), done[case]["tables"]["loss"]


def test_a_token_costs_few_waits(done: dict[str, dict[str, Any]]) -> None:
    """Eight tokens a completion: whether all rows have ended, and a draw for each."""
    assert done["gkd-strict"]["waits"]["generation"] <= 26
    assert done["gkd-data"]["waits"]["generation"] == 0


@pytest.mark.parametrize("case", ["gkd-jsd", "gkd-strict", "gkd-data"])
def test_the_loss_of_the_usual_objectives_waits_for_nothing(case: str, done: dict[str, dict[str, Any]]) -> None:
    assert done[case]["waits"]["loss"] == 0, done[case]["tables"]["loss"]


@pytest.mark.parametrize("case", ["gkd-strict", "minillm"])
def test_a_window_is_prepared_with_few_waits(case: str, done: dict[str, dict[str, Any]]) -> None:
    """The alignment of the texts is still copied array by array."""
    assert done[case]["waits"]["window"] <= 19


def test_a_teacher_on_another_device_changes_nothing(done: dict[str, dict[str, Any]]) -> None:
    for here, beside in (("gkd-dskd", "gkd-beside"), ("gkd-bpm", "gkd-beside-bpm"), ("gkd-strict", "gkd-split")):
        assert done[beside]["values"] == done[here]["values"]
    assert done["minillm-beside"]["values"][0] == done["minillm"]["values"][0]


def test_the_device_gives_the_losses_of_the_cpu(tmp_path: Path, done: dict[str, dict[str, Any]]) -> None:
    models = [tiny.tiny_model(t, i, attn_implementation="eager") for i, t in enumerate((zoo.chatml(), zoo.inst()))]
    options = {"lmbda": 0.0, "objective": "strict", "min_coverage": 0.0}
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), models=tuple(models), **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert done["gkd-data"]["values"] == pytest.approx(losses, rel=1e-5)


MIXED = """
import torch
from support import standin
standin.install()
here, there, host = torch.ones(3, device="standin:0"), torch.ones(3, device="standin:1"), torch.ones(3)
index = torch.tensor([0, 1])
refused = 0
for wrong in (
    lambda: here + host, lambda: here + there, lambda: host[index.to("standin:0")], lambda: here[index.to("standin:1")],
    lambda: here.numpy(), lambda: torch.cat([here, host]), lambda: torch.where(here > 0, host, here),
):
    try:
        wrong()
    except (RuntimeError, TypeError):
        refused += 1
assert (here + torch.tensor(2.0)).cpu().tolist() == [3.0, 3.0, 3.0]
with standin.waits.during("some"):
    float(here.sum()), here[index], here.cpu(), here[here > 0], here.nonzero(), host.to("standin:0")
    here + here, host.to("standin:0", non_blocking=True)
print(refused, standin.waits.total("some"))
"""


def test_the_stand_in_refuses_to_mix_devices_and_counts_waits() -> None:
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    run = subprocess.run([sys.executable, "-c", MIXED], env=environment, capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["7", "6"], run.stderr


@pytest.mark.cuda
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("make", [tiny.gkd, tiny.minillm], ids=["gkd", "minillm"])
def test_a_gpu_gives_the_losses_of_the_cpu(make: Any, name: str, tmp_path: Path) -> None:
    """The first loss on texts of the data (MiniLLM: a finite one), in float32."""
    found = []
    for place in ("cpu", "cuda"):
        teacher = zoo.chatml() if name == "jsd" else zoo.inst()
        models = tuple(
            tiny.tiny_model(t, i, attn_implementation="eager") for i, t in enumerate((zoo.chatml(), teacher))
        )
        data = {"lmbda": 0.0} if make is tiny.gkd else {}
        options = {"use_cpu": place == "cpu", "objective": name, "min_coverage": 0.0, "max_steps": 1, **data}
        trainer = make(tmp_path / place, zoo.chatml(), teacher, tiny.CHAT_ROWS, models=models, **options)
        trainer.train()
        found.append(trainer.state.log_history[0]["loss"])
    assert torch.isfinite(torch.tensor(found)).all()
    if make is tiny.gkd:
        assert found[1] == pytest.approx(found[0], rel=1e-3)
