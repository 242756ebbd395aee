"""The commands of docs/report.md and the README for after a run, on tiny stand-ins."""

from __future__ import annotations

import json
import re
import shutil
import webbrowser
from pathlib import Path

import pytest
import support.tokenizers_zoo as zoo
from support import tiny

from diglot.cli.main import main
from diglot.report import advice
from diglot.watching.shown import SHOWN

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs" / "report.md")
COMMANDS = [
    line.split()[1:]
    for page in PAGES
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)
    for line in block.splitlines()
    if line.startswith(("diglot report", "diglot eval"))
]


def test_the_commands_for_after_a_run_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    trainer = tiny.gkd(Path("runs/first"), zoo.chatml(), zoo.inst(), max_steps=1, log_rollouts=1)
    trainer.train()
    trainer.save_model()
    shutil.copytree("runs/first", "runs/second")
    tiny.tiny_model(zoo.inst()).save_pretrained("teacher")
    zoo.inst().save_pretrained("teacher")
    rows = [json.dumps({"prompt": "Say:", "completion": f" {word} and more"}) + "\n" for word in ("one", "two")]
    Path("heldout.jsonl").write_text("".join(rows), encoding="utf-8")
    assert len(COMMANDS) == 5
    for command in COMMANDS:
        arguments = ["teacher" if word == "Qwen/Qwen2.5-1.5B-Instruct" else word for word in command]
        assert main(arguments) == 0, (command, capsys.readouterr().err)
    assert Path("runs/first/report.html").exists() and Path("comparison.html").exists()
    assert [address for address in opened if address.endswith("report.html")] == opened != []


def test_every_name_on_the_screen_is_explained_beside_the_name_in_the_log() -> None:
    text = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    table = text.split("| on the screen |")[1].split("\n\n")[0]
    rows = [[re.findall(r"`([^`]+)`", cell) for cell in line.split("|")[1:3]] for line in table.splitlines()[2:]]
    names = {shown: name for on_screen, in_log in rows for shown, name in zip(on_screen, in_log, strict=True)}
    assert names == {shown: name for name, shown, _ in SHOWN}
    explained = text.split("| metric | meaning |")[1].split("### Warnings")[0]
    assert [name for name in names.values() if f"`{name}`" not in explained] == []


def test_every_warning_has_its_row() -> None:
    text = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    signs = re.findall(r"^\| ([a-z ]+) \|", text.split("### Warnings")[1].split("## Afterwards")[0], re.M)
    names = {rule.__name__ for rule in advice.RULES}
    assert {sign.replace(" ", "_").replace("falls", "falling") for sign in signs} - {"sign"} == names
