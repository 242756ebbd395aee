"""Tiny students, teachers and data in folders, and runs of the real command line on one or two processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import support.tokenizers_zoo as zoo
import torch
from safetensors.torch import load_file
from support import tiny

ROOT = Path(__file__).resolve().parents[2]
MAIN = Path(__file__).parent / "distributed_main.py"
DEEPSPEED = ROOT / ".venv" / "deepspeed"
TIMEOUT = int(os.environ.get("DIGLOT_TEST_TIMEOUT", "540"))


def make_pair(root: Path, teacher: str = "inst", rows: list[dict[str, Any]] | None = None, **config: Any) -> None:
    """Write `student`, `teacher` and `rows.jsonl` into `root`."""
    for name, tokenizer, seed in (("student", zoo.chatml(), 0), ("teacher", zoo.ALL[teacher](), 1)):
        tiny.save(root / name, tokenizer, seed, **config)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in (rows or uneven_rows())]
    (root / "rows.jsonl").write_text("".join(lines), encoding="utf-8")


def uneven_rows() -> list[dict[str, Any]]:
    """Twelve rows whose completions have between two and sixty words."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Say number {i}."},
                {"role": "assistant", "content": " ".join(f"word{i} naïve 数学" for _ in range(1 + i * i % 20))},
            ]
        }
        for i in range(12)
    ]


@dataclass
class Run:
    """What a run left: the student's parameters, and the folder with everything else."""

    out: Path
    parameters: dict[str, torch.Tensor]

    @classmethod
    def of(cls, out: Path) -> Run:
        """Read the folder of a finished run."""
        names = ("model.safetensors", "adapter_model.safetensors")
        return cls(out, load_file(next(out / name for name in names if (out / name).exists())))


def arguments(root: Path, out: Path, processes: int, how: str = "ddp", **options: Any) -> list[str]:
    """The command line of a run whose window is four rows, however many processes share it."""
    result: dict[str, Any] = dict(
        model_name_or_path=root / "student",
        teacher_model_name_or_path=root / "teacher",
        dataset_name=root / "rows.jsonl",
        output_dir=out,
        per_device_train_batch_size=4 // processes,
        max_steps=3,
        logging_steps=1,
        save_strategy="no",
        max_completion_length=8,
        max_length=256,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        min_coverage=0.0,
        disable_tqdm="true",
    )
    result.update(options)
    if how == "fsdp":
        result.update(fsdp="full_shard auto_wrap", fsdp_config='{"version": 2}')
    if how.startswith("zero"):
        names = (
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "gradient_clipping",
            "train_batch_size",
        )
        result["deepspeed"] = {"zero_optimization": {"stage": int(how[-1])}, **dict.fromkeys(names, "auto")}
    else:
        result["use_cpu"] = "true"
    values = ((name, json.dumps(v) if isinstance(v, (dict, list)) else str(v)) for name, v in result.items())
    return ["train", *(part for name, value in values for part in (f"--{name}", value))]


def launcher(processes: int) -> list[str]:
    """Plain `python` for one process, `torchrun` for more."""
    if processes == 1:
        return [sys.executable]
    results = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    return [*results, "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]


def run_all(plan: Path, processes: int, commands: list[list[str]]) -> str:
    """Run command lines one after the other in the same processes; fails with the whole output, also on a hang."""
    plan.write_text(json.dumps(commands), encoding="utf-8")
    program = [*launcher(processes), str(MAIN), "--plan", str(plan)]
    if not any("--deepspeed" in command for command in commands):
        done = start(program)
    else:
        assert (DEEPSPEED / "deepspeed").exists(), f"no DeepSpeed in {DEEPSPEED}: `make test-real` installs it there"
        path = os.pathsep.join((str(DEEPSPEED / "bin"), os.environ["PATH"]))  # of ninja, which it compiles with
        done = start(program, {"DS_ACCELERATOR": "cpu", "PATH": path}, DEEPSPEED)
    assert done.returncode == 0, done.stdout[-20000:]
    return done.stdout


def start(
    arguments: list[str], environment: dict[str, str] | None = None, *places: Path
) -> subprocess.CompletedProcess[str]:
    """Run to the end or to the time limit; standard error goes with standard output. `places` hold more packages."""
    paths = os.pathsep.join(map(str, (ROOT / "src", ROOT / "tests", *places)))
    own = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1"}
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **own, **(environment or {})},
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        ranks = psutil.Process(process.pid).children(recursive=True)
        for rank in ranks:
            rank.send_signal(signal.SIGABRT)  # each says where it stands
        psutil.wait_procs(ranks, timeout=10)
        for one in (*ranks, psutil.Process(process.pid)):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        output, _ = process.communicate()
        output += f"\nstill running after {TIMEOUT} s: {' '.join(arguments)}"
        return subprocess.CompletedProcess(arguments, -9, output)
    return subprocess.CompletedProcess(arguments, process.returncode, output)


def largest_difference(one: Run, other: Run) -> float:
    """Of any parameter."""
    assert one.parameters.keys() == other.parameters.keys()
    return max(float((one.parameters[n].float() - p.float()).abs().max()) for n, p in other.parameters.items())
