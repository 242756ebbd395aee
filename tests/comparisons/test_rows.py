"""What a trainer knows about its rows before it trains, and rows that come as a stream."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import support.tokenizers_zoo as zoo
from datasets import Dataset
from support import tiny

from diglot.batches.windows import repeated_stream
from diglot.comparisons.rows import RowReader
from diglot.data import Sample, to_sample
from diglot.errors import DataError
from diglot.rendering import Conversation

SYSTEM = {"messages": [{"role": "system", "content": "Be brief."}, *tiny.CHAT_ROWS[0]["messages"]]}
CONVERSATION = Conversation(tuple(SYSTEM["messages"][:2]))
UNANSWERED = {"messages": tiny.CHAT_ROWS[0]["messages"][:1]}


@pytest.mark.parametrize(("row", "message"), [
    (SYSTEM, "train row 3: .*no system role"),  # by the teacher's template alone
    (UNANSWERED, "train row 3 has no completion, and lmbda=0.5 takes the completions of the data in 50%"),
])  # fmt: skip
def test_a_row_that_would_end_a_run_somewhere_is_known_at_its_start(
    row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    rows = [*tiny.CHAT_ROWS[:3], row, *tiny.CHAT_ROWS[3:]]
    with pytest.raises(DataError, match=message):
        tiny.gkd(tmp_path / "out", zoo.chatml(), zoo.inst(), rows, lmbda=0.5)
    assert not (tmp_path / "out").exists()
    trainer = tiny.gkd(tmp_path / "out", zoo.chatml(), zoo.inst(), rows, lmbda=0.5, on_bad_row="skip")
    assert len(trainer.train_dataset) == len(rows) - 1
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_how_messages_are_put_into_templates_is_an_option_of_both_sides(tmp_path: Path) -> None:
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), [SYSTEM, *tiny.CHAT_ROWS], lmbda=0.0, fold_system=True)
    (reader,) = [one.reader for one in trainer.comparisons]
    assert len(trainer.train_dataset) == 9 and reader.student.template.fold_system
    assert b"Be brief." in reader.teacher.vocabulary.bytes_of(reader.teacher.prompt_ids(CONVERSATION))
    row = {"messages": [{"role": "user", "content": "What is <|im_end|>?"}, *tiny.CHAT_ROWS[0]["messages"][1:]]}
    with pytest.raises(DataError, match=r"train row 1: .*\[.<\|im_end\|>.\], which the student reads as control"):
        tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), [*tiny.CHAT_ROWS[:1], row], lmbda=0.0, markers="refuse")
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), [row] * 4, lmbda=0.0, markers="text")
    student = trainer.student_renderer
    ids = student.prompt_ids(Conversation(tuple(row["messages"][:1])))
    assert student.vocabulary.bytes_of(ids[~student.vocabulary.control[ids]]).count(b"<|im_end|>") == 1


def test_a_turn_of_weight_0_is_context_and_never_scored(tmp_path: Path) -> None:
    """As in OpenAI's format for fine-tuning; the other turns keep their tokens and their places."""
    turns = tiny.CHAT_ROWS[0]["messages"]
    plain = [*turns, {"role": "user", "content": "And what is three?"}, {"role": "assistant", "content": "Three is."}]
    marked = [{**m, "weight": 0} if i == 1 else m for i, m in enumerate(plain)]
    for kind in (zoo.chatml(), zoo.inst()):
        trainer = tiny.gkd(tmp_path, zoo.chatml(), kind, [{"messages": marked}] * 4, lmbda=0.0, score_turns="all")
        both, last = (
            trainer.comparisons[0].reader.written(to_sample({"messages": one}, "row")) for one in (plain, marked)
        )
        for side in ("student", "teacher"):
            whole, rows = getattr(both, side), getattr(last, side)
            assert len(whole.segment_bytes) == 2 and rows.segment_bytes == whole.segment_bytes[1:]
            assert rows.ids.tolist() == whole.ids.tolist()
            assert (np.flatnonzero(rows.segment == 0) == np.flatnonzero(whole.segment == 1)).all()


def test_a_row_for_a_teacher_that_there_is_not_is_a_bad_row() -> None:
    readers: list[Any] = [SimpleNamespace(label=label) for label in ("law", "maths")]
    sample = Sample(Conversation(None, "x", route="chess"), "y", "train row 3")
    with pytest.raises(DataError, match="train row 3 names the teacher 'chess'; there are law, maths"):
        RowReader(readers, None, 4)(sample)


def test_rows_without_completion_will_do_where_none_is_read(tmp_path: Path) -> None:
    rows = [UNANSWERED, *tiny.CHAT_ROWS]
    assert len(tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), rows, lmbda=1.0).train_dataset) == 9
    assert len(tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), rows, seq_kd=True).train_dataset) == 9
    assert len(tiny.minillm(tmp_path, zoo.chatml(), zoo.inst(), rows).train_dataset) == 9


@pytest.mark.parametrize(("lmbda", "warned"), [(0.5, True), (1.0, False)])
def test_empty_completions_are_told_at_the_start_of_a_run_that_reads_them(
    lmbda: float, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "x", "completion": "y"}, *[{"prompt": "x", "completion": ""}] * 3]
    tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), rows, lmbda=lmbda)
    assert ("3 of 4 rows of train have an empty completion" in caplog.text) is warned


def test_rows_to_evaluate_on_and_to_imitate_are_read_too(tmp_path: Path) -> None:
    both = {"keywords": {"eval_dataset": Dataset.from_list([SYSTEM])}}
    with pytest.raises(DataError, match=r"eval row 0.*no system role"):
        tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), **both)
    unanswered = [{"prompt": "x", "completion": "y"}, {"prompt": "x", "completion": None}]
    texts = {"keywords": {"lm_dataset": Dataset.from_list(unanswered)}}
    with pytest.raises(DataError, match="lm_dataset row 1 has no completion to imitate"):
        tiny.minillm(tmp_path, zoo.chatml(), zoo.inst(), **texts)


def test_prompts_that_leave_no_space_stop_before_training(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No row of train fits"):
        tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), lmbda=0.0, max_length=9)


def test_a_stream_trains_as_its_rows_do(tmp_path: Path) -> None:
    """Unshuffled: a stream has no sampler."""
    losses = []
    for stream in (False, True):
        trainer = tiny.gkd(
            tmp_path, zoo.chatml(), zoo.inst(), lmbda=0.0, train_sampling_strategy="sequential", save_strategy="no"
        )
        if stream:
            trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1] and len(losses[0]) == 2


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_what_a_template_refuses_in_a_stream_is_named_or_left_out(
    lmbda: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for on_bad_row in ("stop", "skip"):
        trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), lmbda=lmbda, on_bad_row=on_bad_row)
        rows = Dataset.from_list([*tiny.CHAT_ROWS[:5], SYSTEM, *tiny.CHAT_ROWS])
        trainer.train_dataset, _ = trainer.usable_rows(rows.to_iterable_dataset(), None)
        if on_bad_row == "stop":
            with pytest.raises(DataError, match=r"row 5: The teacher's.*no system role.*on_bad_row: skip"):
                trainer.train()
        else:
            trainer.train()
            assert "Left out (on_bad_row): train row 5: The teacher's" in caplog.text
            assert trainer.state.global_step == 2


def test_a_stream_serves_each_window_to_all_inner_epochs(tmp_path: Path) -> None:
    trainer = tiny.minillm(tmp_path, zoo.chatml(), zoo.inst(), max_steps=4, num_iterations=2, teacher_mixed_alpha=0.0)
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    rows: list[list[str]] = []
    prepare = trainer.prepare

    def watched(window: Any) -> Any:
        rows.append([sample.where for batch in window for sample in batch])
        return prepare(window)

    trainer.prepare = watched  # type: ignore[method-assign]
    trainer.train()
    assert rows == [[f"row {i}" for i in part] for part in (range(4), range(4), range(4, 8), range(4, 8))]


def test_windows_of_a_stream_are_whole() -> None:
    stream = Dataset.from_list([{"i": i} for i in range(5)]).to_iterable_dataset()
    assert [row["i"] for row in repeated_stream(stream, 2, 3)] == [0, 1] * 3 + [2, 3] * 3
