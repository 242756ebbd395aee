"""What docs/after.md says to do with the result of a run works on the result of a run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import support.tokenizers_zoo as zoo
import torch
from peft import LoraConfig
from support import tiny
from transformers import AutoModelForCausalLM

from diglot.cli.main import main

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "after.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `runs/first`, all weights trained, and `runs/lora`, an adapter."""
    monkeypatch.chdir(tmp_path)
    tiny.tiny_model(zoo.chatml()).save_pretrained("base")
    zoo.chatml().save_pretrained("base")
    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    for name, keywords in (("first", {}), ("lora", dict(peft_config=adapter))):
        models = "base", tiny.tiny_model(zoo.inst(), 1)
        trainer = tiny.gkd(Path("runs", name), zoo.chatml(), zoo.inst(), models=models, max_steps=1, keywords=keywords)
        trainer.train()
        trainer.save_model()
    return tmp_path / "runs"


def test_a_student_is_used_and_an_adapter_is_merged_as_the_page_says(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    use, merge = BLOCKS
    exec(use, {})
    assert capsys.readouterr().out.strip()
    exec(merge, {})
    merged = AutoModelForCausalLM.from_pretrained(runs / "merged")
    beside = AutoModelForCausalLM.from_pretrained(runs / "lora")
    ids = torch.arange(3, 13)[None]
    assert torch.allclose(merged(ids).logits, beside(ids).logits, atol=1e-4)
    assert not torch.allclose(merged(ids).logits, AutoModelForCausalLM.from_pretrained("base")(ids).logits, atol=1e-4)
    assert main(["inspect", str(runs / "merged"), str(runs / "first")]) == 0


def test_an_adapter_is_measured_as_it_is(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("""{"prompt": "Say a", "completion": " b"}\n""" * 3, encoding="utf-8")
    assert main(["eval", str(runs / "lora"), "--data", str(rows), "--max_completion_length", "4"]) == 0
    assert "bits" in capsys.readouterr().out
