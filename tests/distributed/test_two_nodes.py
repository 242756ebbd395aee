"""A run of two nodes: FSDP2 over both, completions and teacher from servers, one node killed and the run resumed."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import yaml
from support import distributed_pairs as pairs
from support.distributed_pairs import MAIN, ROOT, Run, largest_difference
from support.nodes import Node, two_nodes

from diglot.cli.recipes import load_launches

pytestmark = pytest.mark.real

# As for two processes: sums have another order, and AdamW divides a small gradient by its own size.
TOLERANCE = 1e-4
STEPS, SAVED = 6, 2
PATHS = {"PYTHONPATH": os.pathsep.join(str(ROOT / f) for f in ("src", "tests")), "OMP_NUM_THREADS": "1"}


def started(node: Node, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """A process of a node."""
    environment = {**os.environ, **PATHS, **node.environment(), "HF_HUB_OFFLINE": "1"}
    with log.open("w", encoding="utf-8") as out:
        return subprocess.Popen(
            [*node.prefix, *command], stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT, env=environment
        )


def kill(process: subprocess.Popen[bytes]) -> None:
    """With all that it started, as when a machine goes. Workers are groups of their own."""
    with suppress(psutil.NoSuchProcess):
        tree = psutil.Process(process.pid)
        for one in [*tree.children(recursive=True), tree]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


@contextmanager
def servers(node: Node, folder: Path) -> Iterator[dict[str, str]]:
    """Options of a run that uses both."""
    script = ROOT / "tests" / "support" / "node_servers.py"
    log = folder / "servers.log"
    process = started(node, [sys.executable, str(script), node.address, str(folder)], log)
    try:
        while (text := re.search(r"^(http://\S+) (http://\S+)$", log.read_text("utf-8"), re.M)) is None:
            assert process.poll() is None, log.read_text("utf-8")[-4000:]
            time.sleep(0.05)
        teacher, rollouts = text.groups()
        yield {
            "teacher_model_name_or_path": teacher,
            "teacher_tokenizer_name_or_path": str(folder / "teacher"),
            "vllm_server_base_url": rollouts,
        }
    finally:
        kill(process)


def launched(nodes: Sequence[Node], root: Path, arguments: list[str], name: str) -> list[subprocess.Popen[bytes]]:
    """`accelerate launch` on each node with the configuration of the wheel; a CPU process stands for its GPUs."""
    config = root / "launch.yaml"
    settings = yaml.safe_load(load_launches()["accelerate-fsdp-two-nodes"])
    config.write_text(yaml.safe_dump({**settings, "num_processes": 2, "mixed_precision": "no", "use_cpu": True}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = ["--config_file", str(config), "--main_process_ip", nodes[0].address, "--main_process_port", str(port)]
    start = [sys.executable, "-m", "accelerate.commands.launch", *shared]
    return [
        started(node, [*start, "--machine_rank", str(rank), str(MAIN), *arguments], root / f"{name}-{rank}.log")
        for rank, node in enumerate(nodes)
    ]


def test_two_nodes_follow_one_process_and_go_on_after_one_was_killed(tmp_path: Path) -> None:
    pairs.make_pair(tmp_path)
    options = dict(
        objective="span", lmbda=1.0, use_vllm="true", max_steps=STEPS, save_strategy="steps", save_steps=SAVED
    )
    with two_nodes() as nodes, servers(nodes[0], tmp_path) as served:
        one, two = tmp_path / "one", tmp_path / "two"
        alone = started(
            nodes[0],
            [sys.executable, str(MAIN), *pairs.arguments(tmp_path, one, 1, **{**options, **served})],
            tmp_path / "one.log",
        )
        try:
            assert alone.wait(pairs.TIMEOUT) == 0, (tmp_path / "one.log").read_text()[-8000:]
        finally:
            kill(alone)

        arguments = pairs.arguments(tmp_path, two, 2, **{**options, **served})
        running = launched(nodes, tmp_path, arguments, "killed")
        try:
            until = time.monotonic() + pairs.TIMEOUT
            while not (two / f"checkpoint-{SAVED}" / "trainer_state.json").exists():
                assert time.monotonic() < until and all(p.poll() is None for p in running), logs(tmp_path, "killed")
                time.sleep(0.02)
            kill(running[1])
            assert running[0].wait(pairs.TIMEOUT) != 0, "the node that was left went on alone"
        finally:
            for process in running:
                kill(process)
        assert not (two / "model.safetensors").exists()

        resumed = launched(nodes, tmp_path, [*arguments, "--resume_from_checkpoint", "true"], "resumed")
        try:
            assert [p.wait(pairs.TIMEOUT) for p in resumed] == [0, 0], logs(tmp_path, "resumed")
        finally:
            for process in resumed:
                kill(process)
    assert "spread by FSDP2" in (tmp_path / "resumed-1.log").read_text()
    assert largest_difference(Run.of(one), Run.of(two)) <= TOLERANCE
    assert largest_difference(Run.of(one), Run.of(tmp_path / "student")) > 3 * TOLERANCE


def logs(root: Path, name: str) -> str:
    return "\n".join((root / f"{name}-{rank}.log").read_text()[-6000:] for rank in (0, 1))
