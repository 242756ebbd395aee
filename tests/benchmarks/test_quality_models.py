"""The testbed's real tiers run with tiny stand-ins; answers are graded exactly; a new tokenizer changes no model."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
import torch
from support.stand_in_models import save_model, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

importlib.import_module("quality")
from quality import answers, runner, tasks  # noqa: E402
from quality.bench import open_bench  # noqa: E402
from quality.declaration import Budget, Declaration, DeclarationError, PairDeclaration, load  # noqa: E402
from quality.plots import draw  # noqa: E402
from quality.programs import passes  # noqa: E402
from quality.retokenise import retokenise  # noqa: E402
from quality.runner import Plan, run_all  # noqa: E402
from quality.table import show  # noqa: E402
from quality.training import train  # noqa: E402

from diglot.data import to_sample  # noqa: E402
from diglot.rendering import Renderer  # noqa: E402
from diglot.rollouts import TransformersSampler  # noqa: E402


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models and texts of a test are its own."""
    monkeypatch.setenv("DIGLOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(runner, "_OPEN", {})
    write_rows(tmp_path / "cache")


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    """A student that is wrong and sure of it, and a teacher that is sure of nothing, which is better."""
    student = save_model(tmp_path / "student", zoo.chatml(), 0, 0.5)
    return {"student": str(student), "teacher": str(save_model(tmp_path / "teacher", zoo.nfc(), 1, 0.02))}


def small(tier: str, pair: str, arms: list[str], models: dict[str, str], **options: Any) -> Declaration:
    """One pair of a tier with stand-ins and hardly a budget; everything else is the tier's."""
    whole = load(tier)
    own = whole.pairs[pair]
    sizes = {"length": 12, "answer_length": 12, "pool": 4, "batch": 4, **options}
    if "micro_batch" in own.options:
        sizes |= {"micro_batch": 1, "samples": 2}
    shrunk = replace(
        own,
        options={**own.options, **models, **sizes},
        budget=Budget(steps=1, batch=2, items=4),
        rates=own.rates[:1],
        headroom=1e-6,
        arms=tuple(arms),
        control=None,
    )
    return replace(whole, seeds=(0,), pairs={pair: shrunk})


@pytest.mark.parametrize(
    ("tier", "pair", "arms"),
    [
        ("gpu", "qwen3-llama-math500", ["covering", "ce"]),
        ("gpu", "llama-qwen3-mbpp", ["minillm"]),
        ("cpu", "qwen-smollm2-gsm8k", ["covering", "trl-gold"]),
        ("cpu", "gemma-smollm2-prose", ["span-on"]),
        ("cpu", "qwen-remerged-gsm8k", ["alm"]),
    ],
)
def test_pairs_of_the_real_tiers_run_with_stand_ins(
    tier: str, pair: str, arms: list[str], models: dict[str, str], tmp_path: Path
) -> None:
    declaration = small(tier, pair, arms, models)
    results = run_all(Plan(declaration, tmp_path / "out"))
    (result,) = results
    assert result.refused is None, result.refused
    assert {arm.arm: arm.error for arm in result.arms} == dict.fromkeys(arms)
    table = show(declaration, results)
    for arm in result.arms:
        (cell,) = arm.cells
        graded = {"accuracy"} if "prose" not in pair else set()
        assert (
            set(cell["after"]) == {"reverse_kl", "bits_per_byte", "digits_bits_per_byte", "length", "stopped"} | graded
        )
        assert cell["steps"] == 1 and len(cell["after"]["reverse_kl"]["top"]) == 4
        assert cell["after"]["bits_per_byte"]["value"] != result.headroom["before"]["bits_per_byte"]["value"]  # type: ignore[index]
        assert f"| `{arm.arm}` | {arm.rate:g} |" in table
    assert "Refused" not in table and [path.stem for path in draw(declaration, results, tmp_path)] == [f"{tier}-{pair}"]


def test_off_policy_arms_read_the_teachers_texts_which_are_written_once(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = small("cpu", "qwen-smollm2-gsm8k", ["ce"], models).pairs["qwen-smollm2-gsm8k"]
    bench = open_bench(pair, tmp_path)
    rows = bench.texts(0, 6)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in bench.prompts(0, 6)]
    assert all(row["completion"][0]["role"] == "assistant" for row in rows)
    one = {json.dumps(row["prompt"]): row["completion"] for row in bench.texts(1, 4)}
    assert all(one[json.dumps(row["prompt"])] == row["completion"] for row in rows)
    files = {path: path.read_bytes() for path in (tmp_path / "texts").rglob("*.json")}
    again = open_bench(pair, tmp_path)
    monkeypatch.setattr("quality.models_bench.Evaluator.write", lambda *_, **__: pytest.fail("wrote again"))
    assert again.texts(0, 6) == rows and {path: path.read_bytes() for path in files} == files

    monkeypatch.setattr(again, "texts", lambda *_: pytest.fail("read the teacher's texts"), raising=False)
    from arms import Arm

    train(again, Arm.parse("covering"), Budget(1, 2, 4), 1e-3, 0)
    with pytest.raises(BaseException, match="read the teacher's texts"):
        train(again, Arm.parse("ce@lmbda=0"), Budget(1, 2, 4), 1e-3, 0)


def test_programs_are_run_only_where_the_declaration_says_so(models: dict[str, str], tmp_path: Path) -> None:
    pair = small("gpu", "llama-qwen3-mbpp", ["ce"], models, run_programs=False).pairs["llama-qwen3-mbpp"]
    bench = open_bench(pair, tmp_path)
    assert "accuracy" not in bench.measure(bench.student(), "test")


def test_more_items_or_prompts_than_a_task_has_are_refused(models: dict[str, str], tmp_path: Path) -> None:
    options = {**models, "task": "prose", "length": 8, "pool": 4}
    pair = PairDeclaration("p", "models", Budget(1, 1, 99), (0.1,), 0.1, ("ce",), options)
    with pytest.raises(DeclarationError, match="has 8 items in test, not 99"):
        open_bench(pair, tmp_path).measure_teacher("test")
    with pytest.raises(DeclarationError, match="8 training prompts, not pool: 50"):
        open_bench(replace(pair, options={**options, "pool": 50}), tmp_path)


def test_training_validation_and_test_share_no_row() -> None:
    parts = [[json.dumps(item.row) for item in tasks.items("gsm8k", part)] for part in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [8, 8, 8] and len(set().union(*parts)) == 24


# ---- grading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 3 + 4 = 7 apples.", "7"), ("#### 1,234", "1234"), ("-2.50 dollars", "-2.5"), ("3.0", "3"), ("none", None)],
)
def test_the_last_number_counts_however_it_is_written(text: str, number: str | None) -> None:
    assert tasks.last_number(text) == number


def test_replies_of_a_batch_are_those_of_each_prompt_alone_and_right_ones_are_counted(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(models["student"])
    renderer = Renderer.of_model(model, AutoTokenizer.from_pretrained(models["student"]), name="student")
    greedy = TransformersSampler(renderer.stop_ids, renderer.stop_id, top_k=1)
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("a", "a much longer question", "b c")]
    prompts = [to_sample(row, where="row").conversation for row in rows]
    alone = [text for one in prompts for text in answers.replies(model, renderer, greedy, [one], 6, 1, 0)]
    assert answers.replies(model, renderer, greedy, prompts, 6, 3, 0) == alone and len(set(alone)) > 1

    first, second, *_ = tasks.items("gsm8k", "test")
    (wanted,) = [part["content"] for part in first.row["completion"]]
    monkeypatch.setattr(answers, "replies", lambda *_: [wanted, "#### 99"])
    answers.main([models["student"], "--questions", "2"])
    assert not second.grade("#### 99")
    assert capsys.readouterr().out == "student: 1 of 2 right, 50.0% ± 35.4%\n"


def test_answers_in_boxes_are_compared_without_their_dress() -> None:
    assert tasks.boxed(r"first \boxed{1}, then \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert tasks.boxed("no box") is None and tasks.boxed(r"\boxed{open") is None
    for one, other in ((r"\dfrac{1}{2}", r"\frac{1}{2}"), (r"\left( 1, 2 \right)", "(1,2)"), (r"1{,}000", "1{,}000")):
        assert tasks.plain_answer(one) == tasks.plain_answer(other)
    assert tasks.plain_answer("10,000") == "10000" and tasks.plain_answer(r"5\text{ cm}") == "5cm"
    assert tasks.plain_answer("(1,200)") != tasks.plain_answer("(1,20)")
    grade = tasks.items("math500", "test")[1].grade
    assert grade is not None and grade(r"\boxed{\dfrac{3}{3}}") and not grade("3/3")


def test_a_program_is_found_in_an_answer() -> None:
    assert tasks.program_of("Sure:\n```python\ndef f(): pass\n```\nDone.", "", None) == "def f(): pass\n"
    assert tasks.program_of("    return 1\n", "def f():\n", "f") == "def f():\n    return 1\n"
    whole = "def f():\n    return 1\n"
    assert tasks.program_of(whole, "def f():\n", "f") == whole


def test_a_program_passes_only_if_its_tests_run_to_their_end() -> None:
    right = "def f(x):\n    return x + 1"
    assert passes(right, "assert f(1) == 2")
    assert not passes(right, "assert f(1) == 3")
    assert not passes("import sys\nsys.exit(0)", "assert False")
    assert not passes("while True: pass", "", seconds=0.5)
    assert not passes("x = '\0'", "")


# ---- another tokenizer -------------------------------------------------------------------------------------------

TEXT = "Say hello to the children, one two three: 数学 é 12."


def log_prob(folder: Path) -> tuple[float, list[int], Any]:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        every = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(sum(every[i, token] for i, token in enumerate(ids[1:]))), ids, tokenizer


@pytest.mark.parametrize("tied", [True, False])
def test_shuffled_ids_leave_the_model_as_it_was(tied: bool, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", zoo.chatml(), 0, 0.3, tie_word_embeddings=tied)
    retokenise(source, tmp_path / "target", shuffle=1, drop=0.0)
    (before, ids, old), (after, others, new) = log_prob(source), log_prob(tmp_path / "target")
    assert after == pytest.approx(before, abs=1e-4) and others != ids
    assert new.convert_ids_to_tokens(others) == old.convert_ids_to_tokens(ids)
    assert new.eos_token == old.eos_token and new.eos_token_id != old.eos_token_id
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert model.config.eos_token_id == new.eos_token_id and len(new) == model.config.vocab_size


def test_fewer_merges_write_the_same_bytes_in_more_tokens(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", zoo.chatml(), 0, 0.3)
    retokenise(source, tmp_path / "target", shuffle=1, drop=0.4)
    (_, ids, old), (_, others, new) = log_prob(source), log_prob(tmp_path / "target")
    assert len(others) > len(ids) and new.decode(others) == old.decode(ids) == TEXT
    assert len(new) < len(old)


def test_what_is_no_bpe_keeps_its_tokenizer(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", zoo.unigram(), 0, 0.3)
    with pytest.raises(DeclarationError, match="needs a BPE, and the student's tokenizer is Unigram"):
        retokenise(source, tmp_path / "target", shuffle=0, drop=0.1)
