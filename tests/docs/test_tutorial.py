"""Every step of the tutorial works, in order, on tiny stand-ins for its two models."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from string import Template

import assets
import pytest
import support.tokenizers_zoo as zoo
from support import tiny
from support.tutorial_page import ROOT, steps

from diglot.cli.main import main

WORDS = "The river had been rising since dawn and the old bridge would not hold much longer than that"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """What `demo/assets.py get` leaves, small."""
    root = tmp_path / "cache"
    for name, tokenizer in (("smollm2-135m-instruct", zoo.chatml()), ("gemma-3-270m", zoo.turns())):
        tiny.tiny_model(tokenizer).save_pretrained(root / "models" / name)
        tokenizer.save_pretrained(root / "models" / name)
    (root / "texts").mkdir()
    rows = [{"text": f"{WORDS}, {i}.", "split": split} for split in ("train", "heldout") for i in range(8)]
    (root / "texts" / "passages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root


def test_every_step_of_the_tutorial_works(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    outputs: dict[str, str] = {}
    names: dict[str, str] = {}
    for language, text in steps():
        text = text.replace("~/.cache/diglot", str(cache))
        if language == "python":
            exec(compile(text, "tutorial.md", "exec"), {})
            continue
        names |= dict(re.findall(r"^([A-Z]+)=(\S+)$", text, re.M))
        for line in re.findall(r"^diglot .*$", text.replace("\\\n", " "), re.M):
            words = shlex.split(Template(line).substitute(names))
            assert main(words[1:]) == 0, (line, capsys.readouterr().err)
            outputs[words[1]] = capsys.readouterr().out
    assert outputs.keys() == {"align", "inspect", "train", "report", "eval"}
    assert "this pair can be trained" in outputs["inspect"] and "one to one" in outputs["align"]
    assert "kl/student_to_teacher" in outputs["eval"]
    assert "nats/byte" in outputs["train"] and "coverage 100.0%" in outputs["train"]
    assert (tmp_path / "runs/tutorial/report.html").exists()
    rows = [json.loads(line) for line in Path("prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 8 and all(row.keys() == {"prompt", "completion"} for row in rows)


def test_what_the_tutorial_installs_and_fetches_exists() -> None:
    text = "".join(block for language, block in steps() if language == "bash")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{target}:" in makefile for target in re.findall(r"^make (\S+)", text, re.M))
    (wanted,) = re.findall(r"assets.py get (.+)$", text, re.M)
    assert all(name in {*assets.MODELS, "texts"} for name in wanted.split())
