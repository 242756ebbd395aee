"""What the documentation says is true: its commands and snippets run, its options and files exist."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import support.tokenizers_zoo as zoo
from support import tiny
from support.teacher_server import TeacherServer

from diglot.cli.main import main
from diglot.cli.options import load_options
from diglot.cli.parsing import parse_train

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MADE_BY_THE_BUILD = {"options.md"}  # docs/tools/hooks.py
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.S | re.M)


def blocks(language: str) -> list[tuple[str, str]]:
    """Place and text of each block, but for those that build on one another (test_tutorial.py, test_after_page.py)."""
    return [
        (f"{page.name}:{i}", text)
        for page in PAGES
        if page.name not in ("tutorial.md", "after.md")
        for i, (result, text) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
        if result == language
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Tiny stand-ins for the hub names in the documentation, and a server for its address."""
    root = tmp_path_factory.mktemp("hub")
    for name, tokenizer in (("student", zoo.chatml()), ("teacher", zoo.inst())):
        tiny.tiny_model(tokenizer).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.PROMPT_ROWS), encoding="utf-8")
    server = TeacherServer(tiny.tiny_model(zoo.inst()), zoo.inst()).start()
    yield {
        "HuggingFaceTB/SmolLM2-135M-Instruct": str(root / "student"),
        "Qwen/Qwen2.5-1.5B-Instruct": str(root / "teacher"),
        "prompts.jsonl": str(root / "prompts.jsonl"),
        "http://127.0.0.1:8000": server.url,
    }
    server.stop()


def with_stand_ins(text: str, models: dict[str, str], out: Path) -> str:
    for name, folder in models.items():
        text = text.replace(name, folder)
    return text.replace("runs/first", str(out / "run"))


@pytest.mark.parametrize(("place", "text"), [b for b in blocks("bash") if "diglot train" in b[1]])
def test_diglot_commands_in_the_documentation_train(
    place: str, text: str, models: dict[str, str], tmp_path: Path
) -> None:
    command = with_stand_ins(text, models, tmp_path).replace("\\\n", " ").split()
    small = ["--max_steps", "1", "--use_cpu", "--max_completion_length", "4", "--per_device_train_batch_size", "2"]
    parse_train([*command[2:]])
    done = subprocess.run([sys.executable, "-m", *command, *small], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run").glob("*model.safetensors"))  # or adapter_model.safetensors


@pytest.mark.parametrize(
    "command",
    [
        c
        for _, text in blocks("bash")
        for c in re.findall(r"^diglot (?:inspect|align|recipes|config-schema)\b.*$", text, re.M)
    ],
)
def test_commands_that_look_at_things_run(
    command: str, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(with_stand_ins(command, models, tmp_path))
    assert main(words[1 : words.index(">")] if ">" in words else words[1:]) == 0


@pytest.mark.parametrize(("place", "text"), blocks("python"))
def test_python_snippets_in_the_documentation_run(
    place: str, text: str, models: dict[str, str], tmp_path: Path
) -> None:
    small = "max_completion_length=4, max_steps=1, use_cpu=True"
    code = re.sub(r"max_completion_length=\d+", small, with_stand_ins(text, models, tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_make_targets_in_the_documentation_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {t for _, text in blocks("bash") for t in re.findall(r"^make ([\w-]+)", text, re.M)}
    assert {"demo", "test", "check", "test-real", "nightly"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


def test_links_between_pages_lead_somewhere() -> None:
    """To files that exist, and to headings of theirs. `make docs` checks the same for the site."""
    for page in PAGES:
        for target, heading in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8")):
            file = page.parent / target if target else page
            assert file.exists() or target in MADE_BY_THE_BUILD, (page.name, target)
            assert not heading or heading in anchors(file), (page.name, target, heading)


def anchors(page: Path) -> set[str]:
    """What headings of a page are called in links: small letters, words joined by dashes."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_fault_has_a_test_that_exists_or_a_reason() -> None:
    """The table of docs/faults.md: 58 rows; each names tests that are in the tree, or says why there is none."""
    rows = re.findall(r"^\| (W\d+) \|(.*)\|(.*)\|$", (ROOT / "docs" / "faults.md").read_text(encoding="utf-8"), re.M)
    assert [name for name, _, _ in rows] == [f"W{i}" for i in range(1, 59)]
    sources = {p.name: p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("test_*.py")}
    for name, _, guard in rows:
        tests = re.findall(r"`(test_\w+)\.py::(test_\w+)`", guard)
        assert tests or "does not apply" in guard, name
        for file, test in tests:
            assert f"def {test}(" in sources[f"{file}.py"], (name, file, test)


def test_options_named_in_the_documentation_exist() -> None:
    """Of `diglot train`, of another command, or of the scripts; blocks of plain text are about other programs."""
    folders = ("demo", "benchmarks", "benchmarks/quality", "src/diglot/cli")
    scripts = [p.read_text(encoding="utf-8") for folder in folders for p in (ROOT / folder).glob("*.py")]
    known = {"config", "help", "version", *load_options()}
    known |= {"nproc_per_node", "num_processes"}  # of torchrun and accelerate
    known |= {"install", "show"}  # what the pattern sees of --install-completion and --show-completion
    known |= {option for text in scripts for option in re.findall(r'add(?:_argument)?\(\s*"--(\w+)', text)}
    for page in PAGES:
        ours = re.sub(r"^```text\n.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
        named = set(re.findall(r"(?<![\w-])--([a-z_]+)", ours))
        assert named <= known or page.name == "CONTRIBUTING.md", (page.name, named - known)
