"""Inspection, alignment and recipes on real tokenizers; the documentation's pictures of them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from assets import cache, fetch_texts
from support import tiny
from support.real_assets import model_folder, tokenizer
from support.rollout_server import RolloutServer
from support.teacher_server import TeacherServer
from transformers import AutoModelForCausalLM, AutoTokenizer

from diglot.cli.main import main
from diglot.cli.recipes import load_recipes

pytestmark = pytest.mark.real

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "inspect.md"
SHELL = re.compile(r"```text\n\$ (diglot [^\n]+)\n(.*?)```", re.S)

STAND_INS = {"smollm2": "smollm2", "gemma-3": "gemma3", "qwen": "qwen3", "llama": "llama3"}  # part of a hub name


def tokenizer_folder(model: str) -> Path:
    """The real tokenizer for the hub name of a model."""
    name = next(key for part, key in STAND_INS.items() if part in model.lower())
    return model_folder("smollm2-135m-instruct") if name == "smollm2" else cache() / "tokenizers" / name


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Hub name -> folder of a tiny random model with the real tokenizer."""
    root = tmp_path_factory.mktemp("stand-ins")

    def folder(model: str) -> str:
        name = next(key for part, key in STAND_INS.items() if part in model.lower())
        if not (root / name).exists():
            sizes = {"hidden_size": 128, "intermediate_size": 128}  # blocks of 64 numbers, for weights in 4 bits
            tiny.tiny_model(tokenizer(name), **sizes).save_pretrained(root / name)
            tokenizer(name).save_pretrained(root / name)
        return str(root / name)

    return folder


@pytest.fixture
def serve() -> Iterator[Any]:
    """Folder of a model -> address of a server on loopback that scores with it, or writes."""
    servers: list[TeacherServer | RolloutServer] = []

    def start(folder: str, kind: type[TeacherServer | RolloutServer] = TeacherServer) -> str:
        model = AutoModelForCausalLM.from_pretrained(folder)
        servers.append(kind(model, AutoTokenizer.from_pretrained(folder), 4096).start())
        return servers[-1].url

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("data")
    kinds = {"talk": tiny.PROMPT_ROWS, "plain": [{"prompt": row["text"]} for row in tiny.TEXT_ROWS]}
    for kind, rows in kinds.items():
        (root / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {kind: root / f"{kind}.jsonl" for kind in kinds}


@pytest.mark.parametrize("name", load_recipes())
def test_every_recipe_trains_two_steps_with_stand_ins_for_its_models(
    name: str, stand_ins: Any, serve: Any, data: dict[str, Path], tmp_path: Path
) -> None:
    """The command of its header, with paths and sizes given on the command line; in a process of its own."""
    text = load_recipes()[name]
    (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    options = yaml.safe_load(text)
    run = re.search(r"^# Run: +(.*)$", text, re.M)
    assert run is not None
    command = run[1].split()[: run[1].split().index("--config") + 2]
    command = {"diglot": ["-m", "diglot"], "torchrun": ["-m", "torch.distributed.run"]}[command[0]] + command[1:]
    command = [re.sub(r"^8$", "2", word) for word in command]  # processes
    if options.get("fsdp"):  # which accelerate leaves off on a CPU
        at = command.index("diglot")
        command[at - 1 : at + 1] = [str(ROOT / "tests" / "support" / "distributed_main.py")]
    teacher = options["teacher_model_name_or_path"]
    served = teacher.startswith("http")
    paths = {
        "model_name_or_path": stand_ins(options["model_name_or_path"]),
        "teacher_model_name_or_path": serve(stand_ins(options["teacher_tokenizer_name_or_path"]))
        if served
        else stand_ins(teacher),
        **({"teacher_tokenizer_name_or_path": stand_ins(options["teacher_tokenizer_name_or_path"])} if served else {}),
        "dataset_name": str(data["plain" if "plain text" in text else "talk"]),
        "output_dir": str(tmp_path / "run"),
    }
    if options.get("use_vllm"):
        paths["vllm_server_base_url"] = serve(paths["model_name_or_path"], RolloutServer)
        paths["vllm_weights_dir"] = str(tmp_path / "weights")
    small = ["--max_steps", "2", "--use_cpu", "--max_completion_length", "6", "--disable_tqdm", "--logging_steps", "1"]
    done = subprocess.run(
        [sys.executable, *command, *(word for key, path in paths.items() for word in (f"--{key}", path)), *small],
        capture_output=True, text=True, cwd=tmp_path, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    weights = "adapter_model.safetensors" if options.get("use_peft") else "model.safetensors"
    assert (tmp_path / "run" / weights).exists()
    losses = [float(x) for x in re.findall(r"'loss': '?([-\d.e]+)", done.stdout)]
    assert len(losses) == 2 and all(abs(loss) < 100 for loss in losses), done.stdout[-2000:]


def test_a_pair_of_262144_and_49152_pieces_is_inspected_in_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher = str(tokenizer_folder("smollm2")), str(tokenizer_folder("gemma-3"))
    start = time.process_time()  # what others do on the machine does not count
    assert main(["inspect", student, teacher, "--json"]) == 0
    assert time.process_time() - start < 30
    record = json.loads(capsys.readouterr().out)
    assert record["student"]["missing_bytes"] == 21 and record["teacher"]["missing_bytes"] == 0
    assert record["agreement"]["unalignable"] == 0 and record["overlap"]["count"] > 40_000
    critical = {one["name"]: one for one in record["critical"]}
    assert critical["digits"]["one_to_one"] == 1.0  # both write one digit at a time
    assert record["agreement"]["bytes_cut_unlike"] > 0.02 and record["verdict"]["objective"] != "strict"


def test_digits_of_one_and_of_three_are_seen_to_be_cut_unlike(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tokenizer_folder("qwen")), str(tokenizer_folder("llama")), "--json"]) == 0
    digits = next(c for c in json.loads(capsys.readouterr().out)["critical"] if c["name"] == "digits")
    assert digits["one_to_one"] < 0.5 < digits["aligned"]
    mine, theirs = digits["example"]
    assert len(mine) > len(theirs) and "".join(mine) == "".join(theirs)


def test_a_base_teacher_is_fine_for_plain_text_and_refused_for_conversations(
    data: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pair = [str(model_folder("smollm2-135m-instruct")), str(model_folder("gemma-3-270m"))]
    assert main(["inspect", *pair, "--data", str(data["plain"]), "--json"]) == 0
    capsys.readouterr()
    assert main(["inspect", *pair, "--data", str(data["talk"]), "--json"]) == 1
    assert "no chat template" in " ".join(json.loads(capsys.readouterr().out)["verdict"]["problems"])


def test_the_demo_pair_has_something_to_learn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0.22 nats per byte were measured over 48 prompts; bits per byte of the teacher are the lower ones."""
    rows = [
        {"prompt": " ".join(words[:12]), "completion": " " + " ".join(words[12:60])}
        for words in (row["text"].split(" ") for row in fetch_texts("passages", "heldout")[:6])
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pair = [str(model_folder("smollm2-135m-instruct")), str(model_folder("gemma-3-270m"))]
    small = ["--batch_size", "4", "--max_completion_length", "24", "--dtype", "float32", "--device", "cpu"]
    assert main(["inspect", *pair, "--data", str(tmp_path / "d.jsonl"), "--with-models", *small, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)["models"]
    assert record["bits_per_byte_teacher"] < record["bits_per_byte_student"] < 2
    assert 0.05 < record["headroom_nats_per_byte"] < 0.6
    assert record["parameters_student"] == 134_515_008 and record["gib_weights"] > 1.4


@pytest.mark.parametrize("at", range(2))
def test_the_output_in_the_documentation_is_what_the_program_prints(
    at: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of the hub stand for the folders of the real tokenizers; lines left out are `...`. 120 columns."""
    monkeypatch.setenv("COLUMNS", "120")
    command, expected = SHELL.findall(PAGE.read_text(encoding="utf-8"))[at]
    words = shlex.split(command)[1:]
    folders = [str(tokenizer_folder(word)) for word in words[1:3]]
    assert main([words[0], *folders, *words[3:]]) == 0
    printed = capsys.readouterr().out
    for folder, name in zip(folders, words[1:3], strict=True):
        printed = printed.replace(folder, name)
    lines = [line.rstrip() for line in printed.splitlines()]
    for block in expected.split("\n...\n"):
        wanted = [line.rstrip() for line in block.strip("\n").splitlines()]
        starts = [i for i in range(len(lines)) if lines[i : i + len(wanted)] == wanted]
        assert starts, "\n".join(wanted)
