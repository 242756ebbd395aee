"""`diglot eval` on the real pair: numbers that are known in size and direction."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from assets import fetch_texts
from support.real_assets import model_folder

from diglot.cli.main import main

pytestmark = pytest.mark.real


def test_the_real_pair_has_the_numbers_it_should_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Encyclopedia prose at about a bit per byte; both divergences positive; a third or more of words agreed on."""
    rows = []
    for row in fetch_texts("passages", "heldout")[:12]:
        words = row["text"].split(" ")
        rows.append({"prompt": " ".join(words[:12]), "completion": " " + " ".join(words[12:50])})
    data = tmp_path / "heldout.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    student, teacher = str(model_folder("smollm2-135m-instruct")), str(model_folder("gemma-3-270m"))
    more = ["--max_completion_length", "24", "--batch_size", "12", "--dtype", "float32", "--json"]
    assert main(["eval", student, "--teacher", teacher, "--data", str(data), *more]) == 0
    record = json.loads(capsys.readouterr().out)["models"][student]
    value = {name: one["value"] for name, one in record.items()}
    assert 0.6 < value["bits_per_byte"] < 1.5
    assert value["kl/student_to_teacher"] > 0 and value["kl/teacher_to_student"] > 0
    assert value["coverage"] > 0.95 and 0.2 < value["next_word/agreement"] <= 1
    assert value["next_word/accuracy"] > 0.1 and value["samples/repetition"] < 0.3
    assert all(one["low"] <= one["value"] <= one["high"] for one in record.values() if one["low"] is not None)
