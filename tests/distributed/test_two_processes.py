"""Two processes on gloo follow one process with the same rows in a window, and stop and go on like it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import support.distributed_cases as cases
import support.tokenizers_zoo as zoo
import torch
from support import distributed_pairs as pairs
from support import tiny
from support.distributed_pairs import Run, largest_difference
from transformers import AutoModelForCausalLM

# Of any parameter after three steps of AdamW at 1e-3. Sums have another order on two processes; AdamW divides a small
# gradient by its own size, so a last bit of it may move a parameter by a share of the learning rate.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    cases.make_pairs(folder)
    return folder


def run(root: Path, names: dict[str, Any], processes: int, how: str = "ddp") -> dict[str, Run]:
    """The runs of some cases, all in the same processes."""
    commands = cases.commands(root, names, processes, how)
    pairs.run_all(root / f"{how}{processes}.json", processes, list(commands.values()))
    return {name: Run.of(root / f"{how}{processes}" / name) for name in names}


def assert_same_and_trained(root: Path, one: dict[str, Run], two: dict[str, Run]) -> None:
    results = {name: largest_difference(one[name], two[name]) for name in two}
    assert all(difference <= TOLERANCE for difference in results.values()), results
    for name, result in one.items():
        if "lora" not in name:
            start = Run.of(root / cases.ALL[name][0] / "student")
            assert largest_difference(result, start) > 3 * TOLERANCE, f"{name} did not train"


def test_two_processes_follow_one(root: Path) -> None:
    """Data parallelism, sampled completions of uneven length, both trainers."""
    names = {name: cases.CASES[name] for name in ("covering", "minillm")}
    assert_same_and_trained(root, run(root, names, 1, "few"), run(root, names, 2, "few"))


@pytest.mark.real
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_every_case_follows_one_process(root: Path, one: dict[str, Run], how: str) -> None:
    """The same for every kind of objective, LoRA, ranks with nothing to score, with the teacher sharded under FSDP2."""
    names = cases.ALL if how == "ddp" else cases.CASES
    assert_same_and_trained(root, one, run(root, names, 2, how))


@pytest.fixture(scope="module")
def one(root: Path) -> dict[str, Run]:
    return run(root, cases.ALL, 1)


@pytest.mark.real
@pytest.mark.parametrize("how", ["zero1", "zero2"])
def test_deepspeed_follows_one_process(root: Path, one: dict[str, Run], how: str) -> None:
    """ZeRO's stages 1 and 2: optimizer and gradients in parts, both trainers, LoRA, a rank with nothing to score."""
    names = ["covering", "minillm"]
    if how == "zero2":  # all that stage 1 does, and gradients in parts
        names += ["jsd_data", "covering_split", "lora", "empty_rank"]
    assert_same_and_trained(root, one, run(root, {name: cases.ALL[name] for name in names}, 2, how))


@pytest.mark.real
@pytest.mark.parametrize("how", ["ddp", "fsdp", "zero2"])
def test_a_run_on_two_processes_is_resumed(root: Path, how: str) -> None:
    """Four steps are two, a checkpoint and two more; the student loads as any other."""
    options: dict[str, Any] = dict(max_steps=4, save_strategy="steps", save_steps=2, num_iterations=2)
    names = {"minillm": ("cross", {**cases.MINILLM, **options})}
    through = cases.commands(root / "resume", names, 2, how)["minillm"]
    through = [part.replace(str(root / "resume" / "cross"), str(root / "cross")) for part in through]
    out = root / "resume" / f"{how}2" / "minillm"
    resumed = [part.replace(str(out), str(out) + "_resumed") for part in through]
    resumed += ["--resume_from_checkpoint", str(out / "checkpoint-2")]
    pairs.run_all(root / f"through_{how}.json", 2, [through])
    pairs.run_all(root / f"resumed_{how}.json", 2, [resumed])
    difference = largest_difference(Run.of(out), Run.of(Path(f"{out}_resumed")))
    assert difference == 0.0, difference
    student = AutoModelForCausalLM.from_pretrained(out)
    saved = Run.of(out).parameters
    assert all(torch.equal(p, saved[name]) for name, p in student.named_parameters() if name in saved)


@pytest.mark.real
def test_plain_launchers_start_the_command_line(root: Path) -> None:
    """`torchrun -m diglot` and `accelerate launch -m diglot`, nothing else around them."""
    torchrun = [*pairs.launcher(2), "-m", "diglot"]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    accelerate += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "diglot"]
    for name, start in (("torchrun", torchrun), ("accelerate", accelerate)):
        done = pairs.start([*start, *pairs.arguments(root / "cross", root / name, 2, lmbda=0.0)])
        assert done.returncode == 0, done.stdout[-8000:]
        assert (root / name / "model.safetensors").exists()


@pytest.mark.real
@pytest.mark.parametrize("trainer", ["gkd", "minillm"])
@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_no_rank_steps_where_one_has_a_loss_that_is_no_number(root: Path, on_nonfinite: str, trainer: str) -> None:
    out = root / f"poisoned_{on_nonfinite}_{trainer}"
    options = pairs.arguments(root / "cross", out, 2, trainer=trainer, on_nonfinite=on_nonfinite)
    done = pairs.start(
        [*pairs.launcher(2), str(Path(__file__).parents[1] / "support" / "distributed_poisoned.py"), *options]
    )
    seen: dict[str, list[str]] = {rank: re.findall(rf"rank {rank} step \d has (\w+)", done.stdout) for rank in "01"}
    assert len(seen["0"]) > 1 and seen["0"] == seen["1"], done.stdout[-8000:]
    assert "The loss of step 1 is nan" in done.stdout
    assert (out / "nonfinite" / "step-1-rank-1" / "batches.json").exists()
    if on_nonfinite == "stop":
        assert done.returncode != 0 and len(seen["0"]) == 2 and not (out / "model.safetensors").exists()
        return
    assert done.returncode == 0, done.stdout[-8000:]
    first, second, third = seen["0"]
    assert first != second == third


def test_what_cannot_be_sharded_is_refused(tmp_path: Path) -> None:
    """FSDP 1 and ZeRO-3 hide the student's head; the message says what to set instead."""
    from accelerate.utils import DistributedType

    from diglot.errors import ConfigError
    from diglot.trainers.ranks import check_wrapping

    class Fsdp1:
        distributed_type, is_fsdp2 = DistributedType.FSDP, False

    class Zero3:
        distributed_type = DistributedType.DEEPSPEED
        deepspeed_plugin = type("Plugin", (), {"zero_stage": 3})

    with pytest.raises(ConfigError, match="fsdp_version: 2"):
        check_wrapping(Fsdp1())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="ZeRO stage 3"):
        check_wrapping(Zero3())  # type: ignore[arg-type]
    check_wrapping(tiny.gkd(tmp_path, zoo.chatml(), zoo.inst()).accelerator)


def test_a_hang_ends_and_shows_what_was_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above cannot hang themselves."""
    monkeypatch.setattr(pairs, "TIMEOUT", 3)
    done: subprocess.CompletedProcess[str] = pairs.start(
        [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(60)"]
    )
    assert done.returncode != 0 and "here" in done.stdout and "still running after 3 s" in done.stdout
