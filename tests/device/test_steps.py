"""Training and evaluation on a device that refuses what CUDA refuses, and how often the host waits for it.

Not a GPU: see `support.standin`. The tests marked `cuda` run where there is one.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
import torch
from filelock import FileLock
from support import tiny

from diglot.objectives import OBJECTIVES

TESTS = Path(__file__).resolve().parents[1]
GKD = [
    "data", "generations", "nucleus", "observed", "tied", "lora", "compiled", "accumulated", "beside", "beside-bpm",
    "beside-covering", "split", "split-covering", "split-tied", "several",
]  # fmt: skip
OTHERS = [
    *(f"gkd-{name}" for name in GKD),
    "minillm", "minillm-beside", "minillm-split", "minillm-same", "minillm-tied", "minillm-several",
    "evaluate", "evaluate-beside", "evaluate-split", "resume-gkd", "resume-minillm", "resume-tied",
    "score-logprobs", "score-top_k", "score-bytes",
]  # fmt: skip
EVERY = [f"{trainer}-{name}" for trainer in ("gkd", "minillm") for name in OBJECTIVES]
BUDGET = 5
"""Waits per micro-batch for the loss and its backward pass."""
MORE = {"gkd-accumulated": 2 * (BUDGET + 1) + 2, "gkd-beside": 14}
"""Of two micro-batches of the data, of which `covering` asks more, and a teacher that is tried once; and of one that
reads a teacher on the CPU. They only ever go down."""
TOKENS = 8
"""Of a completion."""


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> dict[str, dict[str, Any]]:
    """What each case gave, from one process: the stand-in changes torch for as long as that lives.

    Where tests run in several processes, the first one that comes here runs it for all.
    """
    root = tmp_path_factory.getbasetemp()
    place = (root if worker_id == "master" else root.parent) / "standin.json"
    with FileLock(f"{place}.lock"):
        if not place.exists():
            place.write_text(json.dumps(_run()))
    record: dict[str, dict[str, Any]] = json.loads(place.read_text())
    return record


def _run() -> dict[str, dict[str, Any]]:
    path = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "support.standin_run"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    record = [json.loads(line[5:]) for line in run.stdout.splitlines() if line.startswith("CASE ")]
    assert record, run.stderr[-3000:]
    return {one["case"]: one for one in record}


def test_every_case_is_looked_at(done: dict[str, dict[str, Any]]) -> None:
    assert set(done) == {*EVERY, *OTHERS}


@pytest.mark.parametrize("case", [*EVERY, *OTHERS])
def test_every_tensor_is_where_its_operation_is(case: str, done: dict[str, dict[str, Any]]) -> None:
    assert "error" not in done[case], done[case]["error"]
    values = done[case]["values"]
    assert values and all(math.isfinite(value) and value != 0 for value in values)


@pytest.mark.parametrize("case", [*EVERY, *(c for c in OTHERS if c.startswith(("gkd", "minillm")))])
def test_the_host_waits_no_more_often_than_allowed(case: str, done: dict[str, dict[str, Any]]) -> None:
    waits = {phase: done[case]["waits"][phase] for phase in ("loss", "backward")}
    assert sum(waits.values()) <= MORE.get(case, BUDGET), [done[case]["tables"][phase] for phase in waits]


@pytest.mark.parametrize("case", [c for c in EVERY if c.startswith("gkd")])
def test_a_token_costs_one_wait(case: str, done: dict[str, dict[str, Any]]) -> None:
    """Whether all rows have ended. What is drawn is drawn on the device."""
    waits = done[case]["waits"]["generation"]
    assert TOKENS <= waits <= TOKENS + 8, done[case]["tables"]["generation"]


def test_texts_of_the_data_cost_no_generation(done: dict[str, dict[str, Any]]) -> None:
    assert done["gkd-data"]["waits"]["generation"] == 0


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in ("covering", "byte", "alm")])
def test_the_loss_of_most_objectives_waits_for_nothing(name: str, done: dict[str, dict[str, Any]]) -> None:
    assert done[f"gkd-{name}"]["waits"]["loss"] == 0, done[f"gkd-{name}"]["tables"]["loss"]


@pytest.mark.parametrize("case", [f"gkd-{name}" for name in OBJECTIVES])
def test_a_window_goes_to_the_device_without_a_wait(case: str, done: dict[str, dict[str, Any]]) -> None:
    assert done[case]["waits"]["window"] == 0, done[case]["tables"]["window"]


def test_rewards_of_a_window_cost_few_waits(done: dict[str, dict[str, Any]]) -> None:
    assert done["minillm"]["waits"]["window"] <= 2, done["minillm"]["tables"]["window"]


def test_a_teacher_on_another_device_changes_nothing(done: dict[str, dict[str, Any]]) -> None:
    pairs = [
        ("gkd-dskd", "gkd-beside"), ("gkd-bpm", "gkd-beside-bpm"), ("gkd-covering", "gkd-beside-covering"),
        ("gkd-strict", "gkd-split"), ("gkd-covering", "gkd-split-covering"), ("gkd-tied", "gkd-split-tied"),
        ("minillm", "minillm-split"), ("evaluate", "evaluate-beside"), ("evaluate", "evaluate-split"),
    ]  # fmt: skip
    for here, beside in pairs:
        assert done[beside]["values"] == done[here]["values"], (here, beside)
    assert done["minillm-beside"]["values"][0] == done["minillm"]["values"][0]


@pytest.mark.parametrize("case", ["resume-gkd", "resume-minillm", "resume-tied"])
def test_resume_on_the_device_is_exact(case: str, done: dict[str, dict[str, Any]]) -> None:
    """The case itself compares the weights of both runs."""
    whole, again = done[case]["values"][:2], done[case]["values"][2:]
    assert again == whole


def test_a_compiled_student_has_the_losses_of_a_plain_one(done: dict[str, dict[str, Any]]) -> None:
    assert done["gkd-compiled"]["values"] == pytest.approx(done["gkd-data"]["values"], rel=1e-5)


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


UNORDERED = """
import torch
from support import standin
standin.install()
x, at = torch.ones(3, device="standin:0"), torch.tensor([0, 0, 1]).to("standin:0")
wrong = [
    lambda: x.cumsum(0), lambda: x.clone().cumsum_(0), lambda: x.scatter_reduce(0, at, x, "sum"),
    lambda: at.bincount(x), lambda: x.kthvalue(1),
]
right = [
    lambda: at.cumsum(0), lambda: at.bincount(), lambda: x.scatter_reduce(0, at, x, "amax"),
    lambda: x.index_add(0, at, x), lambda: x.scatter_add(0, at, x),
]
def raised(them):
    count = 0
    for one in them:
        try:
            one()
        except RuntimeError as error:
            count += "deterministic" in str(error)
    return count
before = raised(wrong)
torch.use_deterministic_algorithms(True)
print(before, raised(wrong), raised(right))
"""


def test_the_stand_in_raises_where_cuda_has_no_order() -> None:
    """All other cases run under this rule: no objective comes to such an operation (`full_determinism`)."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    run = subprocess.run(
        [sys.executable, "-c", UNORDERED], env=environment, capture_output=True, text=True, check=False
    )
    assert run.stdout.split() == ["0", "5", "0"], run.stderr


@pytest.mark.cuda
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("make", [tiny.gkd, tiny.minillm], ids=["gkd", "minillm"])
def test_a_gpu_gives_the_losses_of_the_cpu(make: Any, name: str, tmp_path: Path) -> None:
    """The first loss on texts of the data (MiniLLM: a finite one), in float32."""
    results = []
    for place in ("cpu", "cuda"):
        teacher = zoo.chatml() if name == "jsd" else zoo.inst()
        models = tuple(
            tiny.tiny_model(t, i, attn_implementation="eager") for i, t in enumerate((zoo.chatml(), teacher))
        )
        data = {"lmbda": 0.0} if make is tiny.gkd else {}
        options = {"use_cpu": place == "cpu", "objective": name, "min_coverage": 0.0, "max_steps": 1, **data}
        trainer = make(tmp_path / place, zoo.chatml(), teacher, tiny.CHAT_ROWS, models=models, **options)
        trainer.train()
        results.append(trainer.state.log_history[0]["loss"])
    assert torch.isfinite(torch.tensor(results)).all()
    if make is tiny.gkd:
        assert results[1] == pytest.approx(results[0], rel=1e-3)
