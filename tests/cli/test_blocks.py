"""What a run says before its first step and after its last one."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
import support.tokenizers_zoo as zoo
from support import tiny

from diglot import GKDTrainer, phases
from diglot.cli import blocks
from diglot.cli.script import TrainArguments
from diglot.phases import phase
from diglot.report.runs import Run

SCRIPT = TrainArguments(model_name_or_path="the/student", dataset_name="rows.jsonl")


def fixed(before: float, after: float, error: float = 0.01) -> Run:
    pairs = zip(("before", "after"), (before, after), strict=True)
    records = [{"step": 0, "phase": p, "fixed/kl_nats_per_byte": v, "fixed/kl_error": error} for p, v in pairs]
    return Run("run", [], records, [])


def test_the_start_says_which_model_is_which_what_is_compared_and_how_long(tmp_path: Path) -> None:
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), max_steps=3, per_device_train_batch_size=4)
    lines = dict(blocks.start_lines(trainer, SCRIPT))
    trained = trainer.student.num_parameters()
    assert (
        lines["student"]
        == f"the/student: {trained / 1e3:.3g} K parameters, float32, cpu, {trained / 1e3:.3g} K trained"
    )
    assert "float32" in lines["teacher"] and lines["objective"].startswith("covering (auto: the vocabularies differ, ")
    assert lines["data"] == "rows.jsonl, 8 rows" and lines["steps"].startswith("3 steps of ")
    assert lines["output"] == str(tmp_path)


def test_a_named_objective_needs_no_reason_and_equal_vocabularies_are_one(tmp_path: Path) -> None:
    named = tiny.gkd(tmp_path / "a", zoo.chatml(), zoo.inst(), objective="alm")
    assert dict(blocks.start_lines(named, SCRIPT))["objective"] == "alm"
    same = tiny.gkd(tmp_path / "b", zoo.chatml(), zoo.chatml())
    assert dict(blocks.start_lines(same, SCRIPT))["objective"].startswith("jsd (auto: both sides have one table")


def test_a_teacher_that_is_smaller_than_the_student_is_said(tmp_path: Path) -> None:
    def trainer(sizes: tuple[int, int]) -> GKDTrainer:
        models = tuple(tiny.tiny_model(zoo.chatml(), 0, hidden_size=size) for size in sizes)
        return tiny.gkd(tmp_path / str(sizes), zoo.chatml(), zoo.chatml(), models=models)

    assert list(blocks.swapped(trainer((32, 64)))) == []
    (warning,) = blocks.swapped(trainer((64, 32)))
    assert "is smaller than the student" in warning and "swapped" in warning


def test_a_teacher_of_16_bits_on_a_cpu_is_said_with_what_to_do(tmp_path: Path) -> None:
    student, tokenizers = tiny.tiny_model(zoo.chatml(), 0), (zoo.chatml(), zoo.inst())
    models = [
        (student, tiny.tiny_model(zoo.inst(), 1).to(dtype)) for dtype in (tiny.torch.float32, tiny.torch.bfloat16)
    ]
    assert list(blocks.slow_types(tiny.gkd(tmp_path / "a", *tokenizers, models=models[0]))) == []
    (warning,) = blocks.slow_types(tiny.gkd(tmp_path / "b", *tokenizers, models=models[1]))
    assert "bfloat16" in warning and """--teacher_model_init_kwargs '{"dtype": "float32"}'""" in warning


def test_head_room_is_read_off_the_data_and_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    model = tiny.tiny_model(zoo.chatml(), 0)
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.chatml(), models=(model, tiny.tiny_model(zoo.chatml(), 0)))
    before = tiny.torch.get_rng_state()
    (warning,) = blocks.headroom(trainer)
    assert "not clearly better" in warning and "nothing to learn" in warning  # the teacher is the student
    assert tiny.torch.equal(before, tiny.torch.get_rng_state())


@pytest.mark.parametrize(("bits", "message"), [
    (1.0, "Head room: the teacher reads 8 replies of the data better"), (-1.0, "! The teacher reads 8 replies"),
    (0.0, "nothing to learn"),
])  # fmt: skip
def test_head_room_is_judged_against_its_noise(bits: float, message: str) -> None:
    sizes = np.full(8, 10.0)
    noise = np.array([1, -1] * 4, dtype=float)
    sentence = blocks.judge_headroom(bits * sizes + noise, sizes)
    assert message in sentence and f"{abs(bits):.3f} ± 0.076" in sentence.replace("+", "")  # 2 * sqrt(8/7 * 8) / 80


@pytest.mark.parametrize(("before", "after", "words"), [
    (0.5, 0.25, "better: 50%"), (0.5, 0.51, "no clear change"), (0.25, 0.5, "worse"),
])  # fmt: skip
def test_the_end_says_in_words_whether_it_worked(before: float, after: float, words: str) -> None:
    lines = dict(blocks.end_lines(fixed(before, after)))
    assert lines["verdict"].startswith(words) and f"{before:.3f} -> {after:.3f}" in lines["to the teacher"]


def test_the_next_commands_are_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from diglot.cli.evaluate import parser as eval_parser
    from diglot.cli.report import parser as report_parser

    report, evaluate = (shlex.split(one) for one in blocks.next_commands(Path("a run"), SCRIPT, "the/teacher"))
    assert report_parser().parse_args(report[2:]).run == Path("a run")
    arguments = eval_parser().parse_args(evaluate[2:])
    assert (
        arguments.models == ["a run", "the/student"]
        and arguments.teacher == "the/teacher"
        and arguments.data == "rows.jsonl"
    )


def test_blocks_fit_80_columns_and_commands_are_never_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst())
    blocks.print_start(trainer, SCRIPT, "runs/first/checkpoint-2")
    blocks.print_end(tmp_path, SCRIPT, "the/teacher")
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("  diglot ")]
    assert len(lines) > 8 and max(map(len, lines)) <= 80


def test_a_phase_is_named_when_it_starts_and_timed_if_it_was_long(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level("INFO", "diglot.phases"):
        with phase("Short"):
            assert caplog.messages == ["Short ..."]
        monkeypatch.setattr(phases, "LONG", 0.0)
        with phase("Long"):
            pass
    assert caplog.messages == ["Short ...", "Long ...", "Long: done in 0 s"]
