"""The benchmark suite runs, at the size of a toy, and notices two sides that do not do the same work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import bench
import grouping
import memory
import on_policy
import pytest
import step
import support.tokenizers_zoo as zoo
import torch
from cases import Case, random_case
from measure import BenchError, Timing, alternate, check_same, table
from support import tiny

from diglot.rendering import Renderer

TEXTS = ["The river had been rising since dawn, naïve!", "Say hello, größe 🚀", "def add(a, b): return a + 12"] * 2
ROWS = [{"prompt": "Say:", "completion": text} for text in TEXTS]


def renderers() -> tuple[Renderer, Renderer]:
    return Renderer(zoo.chatml(), name="student"), Renderer(zoo.inst(), name="teacher")


def case(scored: int = 40, rows: list[dict[str, str]] = ROWS) -> Case:
    return random_case("toy", renderers(), rows, scored, (16, 12))


def test_alternating_turns_the_order_round_every_time_and_drops_the_warm_up() -> None:
    calls: list[str] = []
    timing = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert [len(seconds) for seconds in timing.seconds.values()] == [2, 2]


def test_ratios_are_medians_over_rounds() -> None:
    timing = Timing({"a": [2.0, 30.0, 4.0], "b": [1.0, 10.0, 4.0]})
    assert timing.ratio("a", "b") == 2.0
    assert timing.spread("a", "b") == (1.0, 3.0)
    assert timing.median("a") == 4.0


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TRL 1.16.0 needs Python 3.11")
@pytest.mark.parametrize("form", ["hybrid", "sorted"])
def test_both_sides_of_the_loss_stage_read_the_same_and_give_gradients(form: str) -> None:
    from cases import check_trl_reading
    from loss_stage import our_stage, trl_stage

    toy = case()
    assert check_trl_reading(toy) == []
    (theirs, of_trl), (ours, of_us) = trl_stage(toy, form), our_stage(toy, "gold")
    assert of_trl == of_us
    assert theirs()[0] > 0 and ours()[0] > 0


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TRL 1.16.0 needs Python 3.11")
def test_other_texts_on_one_side_of_the_loss_stage_are_noticed() -> None:
    from cases import fingerprint_ours, fingerprint_trl, trl_sides

    other = [{"prompt": "Say:", "completion": text.replace("hello", "jello")} for text in TEXTS]
    one, two = (case(rows=rows).batch() for rows in (ROWS, other))
    assert fingerprint_trl(trl_sides(one)) == fingerprint_ours(one) != fingerprint_ours(two)


def test_the_peak_of_a_stage_is_measured_in_a_process_of_its_own() -> None:
    peak, hidden = memory.peak(case(), "strict", 8)
    assert peak > hidden > 0


def test_step_is_compared_with_the_models_alone(tmp_path: Path) -> None:
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), lmbda=0.0, log_rollouts=0)
    result = step.compare(trainer, ["strict", "covering"], 1)
    assert all(row["ratio"] > 0 and row["cpu_ratio"] > 0 and row["scored"] > 0 for row in result.values())


def test_what_is_watched_now_and_then_is_no_part_of_a_step(tmp_path: Path) -> None:
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), lmbda=0.0, log_rollouts=1)
    with pytest.raises(BenchError, match="log_rollouts=0"):
        step.compare(trainer, ["strict"], 1)


def test_both_samplers_write_the_same_tokens(tmp_path: Path) -> None:
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), tiny.PROMPT_ROWS, lmbda=1.0)
    result = on_policy.compare(trainer, 1)
    assert result["tokens"] > 0 and result["throughput_ratio"] > 0


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TRL 1.16.0 needs Python 3.11")
def test_alignment_finds_trls_chunks_and_is_timed_at_every_size() -> None:
    student, teacher = (grouping.stream(side, TEXTS) for side in renderers())
    assert grouping.compare((student, teacher), len(TEXTS), 1)["tokens"] == len(student.end)
    sizes = list(grouping.growth((student, teacher), len(TEXTS), (100, 1000), repeats=1))
    assert len(sizes) == 2 and 1000 <= sizes[1] < 1000 + len(student.end)


def test_a_comparison_of_unlike_sides_ends_with_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def unlike(repeats: int) -> dict[str, Any]:
        check_same("texts", ours="abc", trl="abd")
        return {}

    monkeypatch.setitem(bench.PARTS, "alignment", unlike)
    assert bench.main(["--only", "alignment", "--out", str(tmp_path)]) == 1
    output = capsys.readouterr().err
    assert "texts differ" in output and "'abc'" in output and "'abd'" in output
    assert not (tmp_path / "summary.json").exists()


def test_the_summary_keeps_parts_of_earlier_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in (("alignment", 1.0), ("step", 2.0)):
        monkeypatch.setitem(bench.PARTS, name, lambda repeats, value=value: {"strict": {"ratio": value}})
        assert bench.main(["--only", name, "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [summary[name]["strict"]["ratio"] for name in ("alignment", "step")] == [1.0, 2.0]


def test_too_little_text_is_an_error_and_tables_line_up() -> None:
    with pytest.raises(BenchError, match="give more text"):
        case(scored=10_000)
    lines = table(("name", "ratio"), [("a", 1.5), ("longer", 22)]).split("\n")
    assert [len(line) for line in lines] == [13, 13, 13] and lines[1].endswith("1.500")


def test_seeds_make_the_same_case_twice() -> None:
    one, two = case(), case()
    assert torch.equal(one.student.hidden, two.student.hidden)
    assert torch.equal(one.teacher.head.module.weight, two.teacher.head.module.weight)
