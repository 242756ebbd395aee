"""A model card names only what the hub knows, shows what was measured, and says how the files are loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
import yaml
from peft import LoraConfig
from support import tiny
from support.made_runs import make_run

from diglot.report import CardFacts, TeacherFacts, model_card
from diglot.report.card import PAPERS, hub_name
from diglot.report.runs import Run, load_run

ROOT = Path(__file__).resolve().parents[2]


def facts(**arguments: Any) -> CardFacts:
    teacher = TeacherFacts(
        arguments.pop("teacher", "org/teacher"), arguments.pop("objectives", {"covering": 1.0}), "bpe", ""
    )
    return CardFacts(**{**dict(model_name="m", student="org/base", teachers=[teacher], method="GKD", vocabulary="bpe",
                               versions="v"), **arguments})  # fmt: skip


def metadata(text: str) -> dict[str, Any]:
    result: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return result


def test_repositories_are_linked_and_named_in_the_metadata() -> None:
    text = str(model_card(facts(datasets=["org/data"], rows=1234, license="mit")))
    head = metadata(text)
    assert (head["base_model"], head["base_model_relation"], head["library_name"]) == (
        "org/base", "finetune", "transformers",
    )  # fmt: skip
    assert (head["datasets"], head["teacher"], head["license"]) == (["org/data"], ["org/teacher"], "mit")
    assert "[org/base](https://huggingface.co/org/base)" in text and "1,234 rows" in text
    assert "(https://huggingface.co/datasets/org/data)" in text


def test_its_tokenizer_stands_below_the_teacher_whose_it_is() -> None:
    rows = [line.split(" | ")[0] for line in str(model_card(facts())).splitlines() if line.startswith("| ")]
    at = rows.index("| teacher")
    assert rows[at : at + 4] == ["| teacher", "| its tokenizer", "| objective", "| vocabularies"]


def test_a_path_is_neither_a_link_nor_a_base_model_and_its_folders_are_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "base").mkdir(parents=True)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    for student in ("org/base", str(tmp_path / "org" / "base"), "./gone/base", "/gone/base"):
        text = str(model_card(facts(student=student, teacher=str(tmp_path), datasets=["rows.jsonl"])))
        head = metadata(text)
        assert not head.keys() & {"base_model", "base_model_relation", "datasets", "teacher"}
        assert "`base` (not on the hub)" in text and "`rows.jsonl`" in text
        assert str(tmp_path) not in text and "huggingface.co/" not in text.split("## Use")[0]


def test_a_model_without_a_name_has_no_base() -> None:
    text = str(model_card(facts(student="")))
    assert "base_model" not in metadata(text) and "a model without a name" in text
    assert hub_name("gpt2") == "gpt2" and hub_name("a b") is None and hub_name("a/b/c") is None


def test_a_bar_in_a_name_of_a_token_does_not_end_the_cell() -> None:
    text = str(model_card(facts(vocabulary="'<|im_end|>'", options={"lmbda": 1.0})))
    assert r"| student's tokenizer | '<\|im_end\|>' |" in text and "| `lmbda` | 1.0 |" in text


def test_an_adapter_is_loaded_with_peft() -> None:
    text = str(model_card(facts(adapter=True)))
    assert metadata(text)["library_name"] == "peft" and metadata(text)["base_model_relation"] == "adapter"
    assert "AutoPeftModelForCausalLM.from_pretrained" in text and "import AutoModelForCausalLM" not in text


def test_results_stand_with_intervals_where_the_noise_was_measured(tmp_path: Path) -> None:
    assert "Nothing was measured" in str(model_card(facts()))
    made = load_run(make_run(tmp_path / "run"))
    assert "| 0.300 | 0.100 | -0.200 |" in str(model_card(facts(run=made)))
    noisy = [{**one, "fixed/kl_error": error} for one, error in zip(made.fixed, (0.03, 0.04), strict=True)]
    text = str(model_card(facts(run=Run("run", [], noisy, []))))
    assert "| 0.300 ± 0.059 | 0.100 ± 0.078 | -0.200 ± 0.098 |" in text  # 1.96 x 0.03, 0.04, 0.05
    assert "| 1.000 | 1.020 | +0.020 |" in text


def test_objectives_and_papers_are_named_once_each() -> None:
    text = str(model_card(facts(objectives={"covering": 1.0, "alm": 0.1, "alm#2": 0.1, "ce": 0.5})))
    assert "`covering` + 0.1 x `alm` + 0.1 x `alm#2` + 0.5 x `ce`" in text
    assert re.findall(r"^@(\w+)\{(\w+)", text, re.M) == [
        ("software", "diglot"), ("misc", "GKD"), ("misc", "covering"), ("misc", "alm"),
    ]  # fmt: skip
    assert "author = {{The Diglot authors}}" in text and "title         = {Approximate" in text


def test_the_papers_of_the_cards_are_those_of_the_documentation() -> None:
    page = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for name, (title, number) in PAPERS.items():
        names = name if name in ("GKD", "MiniLLM") else f"`{name}`"
        assert any(names in row and number in row and title.lower() in row.lower() for row in rows), name


def test_the_card_of_a_run_holds_what_the_run_was(tmp_path: Path) -> None:
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = tiny.gkd(tmp_path / "run", zoo.chatml(), zoo.inst(), log_rollouts=1, max_steps=1, learning_rate=0.5,
                       keywords=dict(peft_config=adapter))  # fmt: skip
    trainer.student.config._name_or_path = str(tmp_path)
    trainer.comparisons[0].teacher.model.config._name_or_path = "org/teacher"
    trainer.dataset_names = ["org/data"]
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    text = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    head = metadata(text)
    assert head["library_name"] == "peft" and head["datasets"] == ["org/data"] and "base_model" not in head
    assert "| `covering` |" in text and "| 0.5 |" in text and "8 rows" in text and str(tmp_path) not in text
    results = text.split("## Results")[1].split("## Training")[0]
    assert len(re.findall(r"^\| .+? \| -?\d+\.\d{3} ± .+ \| .+ \| [+-]\d+\.\d{3} ± ", results, re.M)) == 2
