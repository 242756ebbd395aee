"""`diglot eval` on tiny models: the numbers against the same by hand, and what the command says."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support.tokenizers_zoo as zoo
import torch
from support import tiny

from diglot.cli.evaluate import _headings, _print, lm_eval
from diglot.cli.main import main
from diglot.data import to_sample
from diglot.errors import ConfigError
from diglot.evaluation.battery import Plan, Side, measure
from diglot.evaluation.words import first_word, next_words, places
from diglot.rendering import Renderer

ROWS = [
    {"prompt": "Say it:", "completion": f" {word} and then more of the {word}, once again"}
    for word in ("hello", "naïve café", "one two", "数学 fly", "spaces", "three")
]
SAMPLES = [to_sample(row, f"row {i}") for i, row in enumerate(ROWS)]
PLAN = Plan(max_completion_length=12, batch_size=4, words_per_sample=3, seed=1)


def side(tokenizer: Any, seed: int) -> Side:
    model = tiny.tiny_model(tokenizer, seed)
    return Side("m", model, Renderer(tokenizer, generation_config=model.generation_config))


def test_a_model_against_itself_agrees_in_everything() -> None:
    one = side(zoo.chatml(), 0)
    battery = measure(one, side(zoo.chatml(), 0), SAMPLES, PLAN)
    for name in ("kl/student_to_teacher", "kl/teacher_to_student", "reference/gap"):
        assert battery[name].value == pytest.approx(0, abs=1e-5), name
    assert battery["next_word/agreement"].value == 1 and battery["coverage"].value == 1
    assert battery["stop/agreement"].value == pytest.approx(1, abs=1e-4)


def test_the_gap_on_reference_text_is_the_difference_of_both_models_bits_per_byte() -> None:
    """Without the stop event, which bits per byte leave out."""
    student, teacher = side(zoo.chatml(), 0), side(zoo.inst(), 1)
    both = measure(student, teacher, SAMPLES, PLAN)
    alone = measure(teacher, None, SAMPLES, PLAN)
    difference = (both["bits_per_byte"].value - alone["bits_per_byte"].value) * math.log(2)
    ends = _stop_logp(teacher) - _stop_logp(student)
    size = sum(len(str(s.reply).encode()) for s in SAMPLES)
    assert both["coverage"].value == 1
    assert both["reference/gap"].value == pytest.approx(difference + ends / size, abs=1e-4)


def _stop_logp(one: Side) -> float:
    """Sum over samples of the log-prob of stop behind the reply, one sample at a time."""
    total = 0.0
    for sample in SAMPLES:
        ids = one.renderer.render(sample.conversation, str(sample.reply), stopped=False).ids
        with torch.no_grad():
            logp = one.model(input_ids=torch.from_numpy(ids)[None]).logits[0, -1].log_softmax(-1)
        total += float(logp[list(one.renderer.stop_ids)].logsumexp(-1))
    return total


def test_stop_calibration_is_the_stop_mass_at_the_end_and_over_all_rows() -> None:
    """A reply that the context cuts has no end, and no part in it."""
    one = side(zoo.chatml(), 0)
    cut = to_sample({"prompt": "Say it:", "completion": " hello" * (one.max_length or 0)}, "cut")
    battery = measure(one, None, [*SAMPLES, cut], PLAN)
    at_end, expected = [], []
    for sample in SAMPLES:
        ids = one.renderer.render(sample.conversation, str(sample.reply), stopped=False).ids
        start = len(one.renderer.prompt_ids(sample.conversation))
        with torch.no_grad():
            p = one.model(input_ids=torch.from_numpy(ids)[None]).logits[0, start - 1 :].softmax(-1)
        stop = p[:, list(one.renderer.stop_ids)].sum(-1)
        at_end.append(float(stop[-1]))
        expected.append(float(stop.sum()))
    assert battery["stop/at_end"].value == pytest.approx(np.mean(at_end), rel=1e-3)
    assert battery["stop/expected_per_reply"].value == pytest.approx(np.mean(expected), rel=1e-3)
    assert battery["stop/at_end"].low <= battery["stop/at_end"].value <= battery["stop/at_end"].high


def test_each_direction_is_measured_on_its_own_writers_samples() -> None:
    """KL(student || teacher) on what the student writes, the other on what the teacher writes: swapping both swaps."""
    student, teacher = side(zoo.chatml(), 0), side(zoo.inst(), 1)
    one, other = measure(student, teacher, SAMPLES, PLAN), measure(teacher, student, SAMPLES, PLAN)
    assert one["kl/student_to_teacher"].value == pytest.approx(other["kl/teacher_to_student"].value, abs=1e-5)
    assert one["kl/teacher_to_student"].value == pytest.approx(other["kl/student_to_teacher"].value, abs=1e-5)
    assert one["kl/student_to_teacher"].value != pytest.approx(one["kl/teacher_to_student"].value, abs=1e-3)


def test_data_without_replies_leave_out_what_needs_them() -> None:
    prompts = [to_sample({"prompt": "Say it:"}, f"row {i}") for i in range(3)]
    battery = measure(side(zoo.chatml(), 0), None, prompts, PLAN)
    assert {"samples/length", "samples/stopped", "samples/entropy"} <= battery.keys()
    assert not [name for name in battery if name.split("/")[0] in ("bits_per_byte", "next_word", "kl", "reference")]


def test_the_next_word_is_what_greedy_decoding_gives_one_at_a_time() -> None:
    one = side(zoo.chatml(), 3)
    asking = [(sample, k) for sample in SAMPLES[:4] for k in places(str(sample.reply), 2, "x")]
    result = next_words(one.model, one.renderer, asking, max_length=512, batch_size=3)
    for (sample, k), word in zip(asking, result, strict=True):
        ids = one.renderer.render(sample.conversation, str(sample.reply)[:k], stopped=False).ids.tolist()
        start = len(ids)
        for _ in range(8):
            with torch.no_grad():
                ids.append(int(one.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in one.renderer.stop_ids:
                break
        assert word == first_word(one.renderer.vocabulary.bytes_of(ids[start:]).decode("utf-8", "ignore"))
    assert len(set(result)) > 1


def test_places_are_ends_of_words_that_another_word_follows() -> None:
    text = "one  two\nthree four "
    assert places(text, 9, "s") == [3, 8, 14]
    assert places(text, 2, "s") == places(text, 2, "s") and places("word", 3, "s") == []


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    for name, tokenizer in (("student", zoo.chatml()), ("teacher", zoo.inst())):
        tiny.save(root / name, tokenizer)
    (root / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return root


def command(hub: Path, *more: str) -> list[str]:
    return ["eval", str(hub / "student"), "--data", str(hub / "d.jsonl"), "--max_completion_length", "8", *more]


def test_the_command_prints_json_or_a_table(hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(hub, "--teacher", str(hub / "teacher"), "--json")) == 0
    output = capsys.readouterr()
    for role in ("student", "teacher"):
        assert f"Loading the {role} {hub / role} ..." in output.err
    record = json.loads(output.out)["models"][str(hub / "student")]
    assert record["bits_per_byte"]["low"] < record["bits_per_byte"]["value"] < record["bits_per_byte"]["high"]
    assert record["kl/student_to_teacher"]["unit"].startswith("nats per byte")
    assert main(command(hub, "--rows", "2")) == 0
    assert "bits_per_byte" in capsys.readouterr().out


@pytest.mark.parametrize("names", [["runs/first", "/models/smollm2-135m-instruct"], ["/a/run-a", "/a/run-b", "org/x"]])
def test_the_table_of_several_models_fits_80_columns_with_names_that_tell_them_apart(
    names: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    one = measure(side(zoo.chatml(), 0), side(zoo.inst(), 1), SAMPLES, PLAN)
    _print({name: {key: value.as_json() for key, value in one.items()} for name in names})
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in "".join(lines)
    heads = [cell.strip() for cell in lines[2].split("┃")[2:-1]]
    assert len(set(heads)) == len(names) and all(name.endswith(head) for name, head in zip(names, heads, strict=True))
    first = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert [key for key in one if key not in first] == []


def test_models_whose_last_parts_are_the_same_are_called_as_they_were_given() -> None:
    long = ["/experiments/of/last/week/student", "/experiments/of/this/week/student"]
    assert _headings(long) == long
    assert _headings(["runs/a", long[0]]) == ["runs/a", "student"]


def test_lm_eval_that_is_not_installed_is_an_error_before_anything_is_measured(
    hub: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(command(hub, "--lm_eval_tasks", "arc_easy")) == 2
    assert "pip install 'lm-eval[hf]'" in capsys.readouterr().err


def test_lm_eval_loads_a_tokenizer_of_its_own_and_arguments_for_one_are_refused(
    hub: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    arguments = ["--lm_eval_tasks", "arc_easy", "--tokenizer_kwargs", '{"eos_token": "<unk>"}']
    assert main(command(hub, *arguments)) == 2
    assert "would not reach --lm_eval_tasks arc_easy" in capsys.readouterr().err


STAND_IN = """
import json, pathlib, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if options["--tasks"] == "no_such_task":
    sys.exit("ValueError: Tasks not found: no_such_task")
assert options["--model"] == "hf"
folder = pathlib.Path(options["--output_path"]) / "some__model"
folder.mkdir(parents=True)
results = {task: {"acc,none": 0.5, "of": options["--model_args"]} for task in options["--tasks"].split(",")}
(folder / "results_2026-01-01.json").write_text(json.dumps({"results": results}))
"""


def test_lm_eval_runs_in_its_own_process_and_its_results_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program with lm-eval's command line and folders; its errors are handed on with the command to try."""
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval" / "__init__.py").touch()
    (tmp_path / "lm_eval" / "__main__.py").write_text(STAND_IN, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = lm_eval("some/model", "a,b", 4)
    assert result == {task: {"acc,none": 0.5, "of": "pretrained=some/model"} for task in ("a", "b")}
    with pytest.raises(ConfigError, match="Tasks not found: no_such_task") as error:
        lm_eval("some/model", "no_such_task", 4)
    assert f"{sys.executable} -m lm_eval" in str(error.value)
