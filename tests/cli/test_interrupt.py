"""Ctrl-C in a terminal: the step is finished and saved, the way to go on is said, and nobody prints a traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
from support import tiny
from transformers import TrainerCallback

from diglot.checkpoints.saving import last_whole
from diglot.cli.main import main
from diglot.errors import StoppedError

FOREVER = 100_000  # steps: no run here gets to its end by itself


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    tiny.save_pair(root)
    return [
        "train", "--model_name_or_path", str(root / "student"), "--teacher_model_name_or_path", str(root / "teacher"),
        "--dataset_name", str(root / "data.jsonl"), "--use_cpu", "--max_completion_length", "6", "--logging_steps", "1",
        "--save_strategy", "no", "--log_rollouts", "0", "--lr_scheduler_type", "constant",
    ]  # fmt: skip


class Terminal:
    """A run in the foreground of a terminal: what it prints, and a key that signals its whole process group."""

    def __init__(self, arguments: list[str]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "diglot.cli.main", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=environment,
        )  # fmt: skip
        self.guard = threading.Timer(120, self.process.kill)
        self.guard.start()
        assert self.process.stdout is not None
        self.printed, self.stream = "", self.process.stdout

    def until(self, text: str) -> None:
        while text not in self.printed:
            read = self.stream.read(1)
            assert read, self.printed
            self.printed += read

    def press_ctrl_c(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self) -> int:
        self.printed += self.stream.read()
        self.stream.close()
        self.guard.cancel()
        return self.process.wait()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_continue(command: list[str], out: Path) -> None:
    run = Terminal([*command, "--output_dir", str(out), "--max_steps", str(FOREVER)])
    run.until("step 2:")
    run.press_ctrl_c()
    assert run.end() == 130
    step = int(last_whole(out).name.removeprefix("checkpoint-"))
    assert step >= 2 and not list(out.glob(".saving-*"))
    assert "Ctrl-C: finishing this step, saving a checkpoint, then exiting." in run.printed
    assert f"after step {step}. checkpoint-{step} in {out} is complete. Continue with --resume" in run.printed
    assert "Traceback" not in run.printed and "KeyboardInterrupt" not in run.printed
    again = [*command, "--output_dir", str(out), "--max_steps", str(step + 1), "--resume_from_checkpoint"]
    assert main(again) == 0  # what it said works
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert steps[-1] == step + 1


def test_a_second_ctrl_c_kills_at_once(command: list[str], out: Path) -> None:
    run = Terminal([*command, "--output_dir", str(out), "--max_steps", "1", "--max_completion_length", "500"])
    run.until("0/1")  # the one step takes longer than this test
    run.press_ctrl_c()
    run.until("A second signal kills at once.")
    run.press_ctrl_c()
    assert run.end() == 130
    assert "Traceback" not in run.printed and not list(out.glob("checkpoint-*"))


def test_ctrl_c_before_training_is_one_line(command: list[str], out: Path) -> None:
    run = Terminal([*command, "--output_dir", str(out), "--max_steps", str(FOREVER)])
    run.until("Loading weights")
    run.press_ctrl_c()
    assert run.end() == 130
    assert "Traceback" not in run.printed


def test_ctrl_c_ends_a_command_that_swallows_it(tmp_path: Path) -> None:
    """An exception that is raised while Python deletes an object is dropped. Its traceback is not shown."""
    program = tmp_path / "swallows.py"
    program.write_text(
        "import os, signal, time\n"
        "import diglot.cli.failures as failures\n"
        "failures._PATIENCE = 0.2\n"
        "class Deleted:\n"
        "    def __del__(self): os.kill(os.getpid(), signal.SIGINT); time.sleep(0.01)\n"
        "with failures.ending_on_ctrl_c():\n"
        "    one = Deleted(); del one\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=50)
    assert done.returncode == 130 and "diglot: Interrupted by Ctrl-C" in done.stderr
    assert "Traceback" not in done.stderr and "ignored" not in done.stderr


def test_a_stopped_run_does_not_answer_its_fixed_prompts_once_more(tmp_path: Path) -> None:
    class CtrlC(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    trainer = tiny.gkd(
        tmp_path, zoo.chatml(), zoo.inst(), max_steps=3, log_rollouts=4, keywords={"callbacks": [CtrlC()]}
    )
    with pytest.raises(StoppedError) as stopped:
        trainer.train()
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    phases = [record["phase"] for record in map(json.loads, lines) if "phase" in record]
    assert stopped.value.code == 130 and phases == ["before"]
