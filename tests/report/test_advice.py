"""Warnings on made histories: each comes when it should, names what was seen, and not before."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support.tokenizers_zoo as zoo
from support import tiny

from diglot.report import advise, all_advice
from diglot.report.advice import selection
from diglot.report.runs import load_run

HEALTHY: dict[str, float] = {
    "align/coverage": 0.99,
    "completions/repetition": 0.05,
    "completions/mean_bytes": 400.0,
    "rollouts/stop_agreement": 0.8,
    "rollouts/teacher_markup_surprisal": 1.0,
}
BAD: dict[str, tuple[str, float]] = {
    "coverage_falling": ("align/coverage", 0.8),
    "repetition": ("completions/repetition", 0.6),
    "length_collapse": ("completions/mean_bytes", 60.0),
    "stop_disagreement": ("rollouts/stop_agreement", 0.3),
    "markup_surprise": ("rollouts/teacher_markup_surprisal", 9.0),
}


def history(*parts: tuple[int, dict[str, float]]) -> list[dict[str, Any]]:
    """`(number of logs, what differs from a healthy run)` one after the other, a log every ten steps."""
    entries = [{**HEALTHY, **changed} for number, changed in parts for _ in range(number)]
    return [{"step": 10 * (i + 1), **entry} for i, entry in enumerate(entries)]


def test_a_healthy_run_is_not_warned_about() -> None:
    assert advise(history((30, {}))) == [] == advise([]) == advise([{"step": 1, "eval_loss": 1.0}])


@pytest.mark.parametrize("name", BAD)
def test_each_sign_gives_its_own_advice_and_no_other(name: str) -> None:
    metric, value = BAD[name]
    advice = advise(history((6, {}), (3, {metric: value})))
    assert [one.name for one in advice] == [name]
    assert advice[0].step == 90 and any(c.isdigit() for c in advice[0].text) and len(advice[0].text) > 80


@pytest.mark.parametrize("name", BAD)
def test_one_odd_log_is_no_trend(name: str) -> None:
    metric, value = BAD[name]
    for after in range(3):
        assert advise(history((6, {}), (1, {metric: value}), (after, {}))) == []
    assert advise(history((6, {}), (2, {metric: value}))) != []


def test_a_run_that_was_bad_from_the_start_is_no_trend() -> None:
    assert advise(history((12, {"completions/repetition": 0.6, "completions/mean_bytes": 30.0}))) == []


def test_over_a_whole_run_each_kind_is_said_once_where_it_began() -> None:
    advice = all_advice(history((6, {}), (6, {"align/coverage": 0.7}), (6, {"completions/repetition": 0.9})))
    assert [(one.name, one.step) for one in advice] == [("coverage_falling", 80), ("repetition", 140)]


def test_metrics_that_a_log_lacks_are_passed_over() -> None:
    logs = history((6, {}), (3, {"align/coverage": 0.6}))
    mixed = [entry for log in logs for entry in (log, {"step": log["step"], "eval_loss": 1.0, "align/coverage": None})]
    assert [one.name for one in advise(mixed)] == ["coverage_falling"]


def test_the_trainer_says_it_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), max_steps=1)
    callback = next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "RecordCallback")
    trainer.state.is_world_process_zero = True
    trainer.state.log_history = history((6, {}), (3, {"align/coverage": 0.6}))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            callback.on_log(trainer.args, trainer.state, trainer.control, logs={"loss": 1.0})
    messages = [r.getMessage() for r in caplog.records if "coverage fell" in r.getMessage()]
    assert len(messages) == 1 and "99.0%" in messages[0] and "60.0%" in messages[0]


def strict_on_numbers(steps: int) -> list[dict[str, Any]]:
    """What a step was seen to look like where the teacher reads numbers whole and the student digit by digit."""
    rise = [min(1.0, max(0, i - 3) / 8) for i in range(steps)]
    return [
        {
            "step": i,
            "align/one_to_one": 0.58 + 0.3 * part,
            "completions/digit_run": 1.9 - 0.8 * part,
            "completions/tokens_per_byte": 0.31,
            **({"watched/bits_per_byte": 0.147 + 0.2 * part} if i % 5 == 0 else {}),
        }
        for i, part in enumerate(rise)
    ]


def test_a_run_that_unlearns_numbers_is_seen_within_twenty_steps_with_cause_and_cure() -> None:
    texts = [advice for n in range(1, 21) if (advice := selection(strict_on_numbers(n)))]
    assert texts and texts[0].step < 20
    assert "58%" in texts[0].text and "the text happens to end a token on both sides" in texts[0].text
    assert "objective: covering" in texts[0].text
    assert "1.9 to 1.1 digits" in texts[-1].text and "0.147 to" in texts[-1].text


@pytest.mark.parametrize(
    "healthy", [{"completions/digit_run": 1.9, "watched/bits_per_byte": 0.147}, {"align/one_to_one": 0.58}]
)
def test_one_of_the_signs_alone_is_none(healthy: dict[str, float]) -> None:
    """Writing more as the teacher cuts, or shorter numbers, may be what was to be learnt."""
    for n in range(1, 31):
        assert selection([{**one, **healthy} for one in strict_on_numbers(n)]) is None


def test_the_trainer_says_it_at_the_step_and_writes_it_down(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer's own sums, of a student that writes ever shorter numbers; no step of it is logged before the end."""
    options: dict[str, Any] = dict(max_steps=12, logging_steps=100, lmbda=1.0)
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), tiny.PROMPT_ROWS[:1] * 4, **options)
    encoder, stop = trainer.student_renderer.encoder, trainer.student_renderer.stop_id

    def write(conversations: Any, prompts: Any, seeds: Any) -> list[np.ndarray]:
        text = "naïve café 1234 5678 90123 " if trainer.state.global_step < 4 else "1 2 3 4 5 6 7 8 9 "
        return [np.append(one.ids, stop).astype(np.int64) for one in encoder.encode([text * 8] * len(prompts))]

    monkeypatch.setattr(trainer, "sample", write)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    messages = [r.getMessage() for r in caplog.records if "unlearning" in r.getMessage()]
    assert len(messages) == 1 and "digits" in messages[0]
    reported = all_advice(load_run(tmp_path).logs)
    assert [(one.name, one.step) for one in reported] == [("selection", int(messages[0].split()[1][:-1]))]


def test_a_warning_that_the_run_has_said_is_in_the_report_though_the_logs_do_not_show_it() -> None:
    line = {"step": 12, "warning": "selection", "text": "the student is unlearning"}
    advice = all_advice([*history((6, {})), line])
    assert [(one.name, one.step, one.text) for one in advice] == [("selection", 12, "the student is unlearning")]
