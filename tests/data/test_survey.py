"""Every row is read once before training: what is said, what is left out, what is kept on disk."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from diglot.data import Sample, collate_samples, survey, usable_rows
from diglot.errors import DataError, RenderingError

ROWS: list[dict[str, Any]] = [{"prompt": f"p{i}", "completion": "c"} for i in range(6)]


class Reading:
    """Reads all rows but those that a test names."""

    def __init__(self, bad: tuple[str, ...] = (), long: tuple[str, ...] = ()) -> None:
        self.bad, self.long, self.seen = bad, long, 0

    def __call__(self, sample: Sample) -> bool:
        self.seen += 1
        if sample.conversation.text in self.bad:
            raise RenderingError("the template refuses it")
        return sample.conversation.text not in self.long


def usable(reading: Reading, rows: list[dict[str, Any]] = ROWS, on_bad_row: str = "stop", **more: Any) -> Any:
    options = {"name": "train", "about": {"limit": 9}, "on_bad_row": on_bad_row, **more}
    return usable_rows(Dataset.from_list(rows), reading, **options)


def test_bad_rows_stop_with_their_names_and_number() -> None:
    message = r"3 of 7 rows of train.*\ntrain row 1: the template refuses it \(and 1 more\)\ntrain row 6: `prompt` is"
    with pytest.raises(DataError, match=message):
        usable(Reading(bad=("p1", "p4")), [*ROWS, {"prompt": "", "completion": "c"}])


def test_bad_rows_are_skipped_and_counted_and_the_others_keep_their_numbers(caplog: pytest.LogCaptureFixture) -> None:
    rows = [*ROWS, {"prompt": ""}]
    good = usable(Reading(bad=("p1",)), rows, on_bad_row="skip")
    assert [(row["prompt"], row["__row__"]) for row in good] == [("p0", 0), *((f"p{i}", i) for i in range(2, 6))]
    assert "2 of 7 rows of train cannot be used and are left out" in caplog.text
    assert "train row 1: the template" in caplog.text and "train row 6: `prompt` is empty" in caplog.text


def test_a_dataset_without_a_usable_row_is_an_error_even_when_they_are_skipped() -> None:
    with pytest.raises(DataError, match="6 of 6 rows"):
        usable(Reading(bad=tuple(row["prompt"] for row in ROWS)), on_bad_row="skip")
    with pytest.raises(DataError, match="No row of train fits"):
        usable(Reading(long=tuple(row["prompt"] for row in ROWS)))
    with pytest.raises(DataError, match="train has no rows"):
        usable_rows(Dataset.from_dict({"prompt": []}), Reading(), name="train", about={}, on_bad_row="skip")


@pytest.mark.parametrize("trained_on", [True, False])
def test_rows_with_an_empty_completion_are_told_where_completions_are_trained_on(
    trained_on: bool, caplog: pytest.LogCaptureFixture
) -> None:
    ask, call = {"role": "user", "content": "a"}, {"function": {"name": "f", "arguments": "{}"}}
    rows = [
        *({**row, "messages": None} for row in ROWS),
        {"messages": [ask, {"role": "assistant", "content": "", "tool_calls": None}]},
        {"messages": [ask, {"role": "assistant", "content": "", "tool_calls": [call]}]},
        *[{"prompt": "p", "completion": ""}] * 7,
        {"prompt": "", "completion": ""},
    ]
    usable(Reading(), rows, on_bad_row="skip", replies=trained_on)
    messages = [record.getMessage() for record in caplog.records if "empty completion" in record.getMessage()]
    assert len(messages) == trained_on
    if trained_on:
        assert messages[0].startswith("8 of 16 rows of train have an empty completion")
        assert messages[0].endswith("The first: row 6, row 8, row 9, row 10, row 11.")


def test_rows_that_do_not_fit_are_told_and_stay(caplog: pytest.LogCaptureFixture) -> None:
    assert len(usable(Reading(long=("p2",)))) == 6
    assert "1 of 6 rows of train do not fit" in caplog.text


@pytest.mark.parametrize(("templates", "warned"), [(True, True), (False, False)])
def test_plain_prompts_beside_two_templates_are_told(
    templates: bool, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    usable(Reading(), templates=templates)
    assert ("6 of 6 rows of train have prompts of plain text" in caplog.text) is warned


def test_text_without_a_prompt_asks_for_no_template(caplog: pytest.LogCaptureFixture) -> None:
    usable(Reading(), [{"text": "a"}], templates=True)
    assert "plain text" not in caplog.text


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIGLOT_CACHE", str(tmp_path))
    monkeypatch.setattr(survey, "LEAST", 1)
    return tmp_path / "rows"


def test_what_was_found_is_kept_and_read_again(cache: Path) -> None:
    first, again = Reading(bad=("p1",), long=("p2",)), Reading()
    for reading in (first, again):
        assert len(usable(reading, on_bad_row="skip")) == 5
    assert (first.seen, again.seen) == (6, 0)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("change", ["rows", "reader", "code"])
def test_other_rows_readers_or_code_are_read_anew(change: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usable(Reading())
    rows = [*ROWS[:5], {"prompt": "p5", "completion": "d"}] if change == "rows" else ROWS
    if change == "code":
        monkeypatch.setattr(survey, "_code", lambda: "other")
    anew = Reading()
    usable(anew, rows, about={"limit": 8 if change == "reader" else 9})
    assert anew.seen == 6


def test_an_entry_that_is_damaged_is_made_anew(cache: Path) -> None:
    usable(Reading())
    next(cache.iterdir()).write_text("{")
    anew = Reading()
    usable(anew)
    assert anew.seen == 6


def streamed(reading: Reading, rows: list[dict[str, Any]], on_bad_row: str, **more: Any) -> Any:
    stream = Dataset.from_list(rows).to_iterable_dataset()
    return usable_rows(stream, reading, name="train", about={}, on_bad_row=on_bad_row, **more)


def test_a_stream_that_skips_leaves_out_what_a_template_refuses_too(caplog: pytest.LogCaptureFixture) -> None:
    rows = streamed(Reading(bad=("p0", "p2")), [*ROWS, {"prompt": "", "completion": "c"}], "skip")
    rows = pickle.loads(pickle.dumps(rows))  # as data workers get it
    assert [row["__row__"] for row in rows] == [1, 3, 4, 5]
    for reason in ("row 0: the template refuses it", "row 2: the template refuses it", "row 6: `prompt` is empty"):
        assert f"Left out (on_bad_row): train {reason}" in caplog.text


def test_a_stream_that_stops_is_not_read_twice() -> None:
    reading = Reading()
    stream = iter(streamed(reading, [*ROWS, {"prompt": "", "completion": "c"}], "stop"))
    assert [next(stream)["__row__"] for _ in range(6)] == list(range(6)) and reading.seen == 1
    with pytest.raises(DataError, match=r"train row 6: `prompt` is empty.*on_bad_row: skip"):
        next(stream)


@pytest.mark.parametrize("trained_on", [True, False])
def test_empty_completions_of_a_stream_are_counted_as_they_come(
    trained_on: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": f"p{i}", "completion": "" if i % 2 else "c"} for i in range(40)]
    assert len(list(streamed(Reading(), rows, "stop", replies=trained_on))) == 40
    messages = [record.getMessage() for record in caplog.records if "empty completion" in record.getMessage()]
    assert [one.split(" have")[0] for one in messages] == [
        "1 of 2 rows of train",
        "10 of 20 rows of train",
    ] * trained_on
    assert not trained_on or messages[1].endswith("The first: row 1, row 3, row 5, row 7, row 9.")


def test_a_bad_row_of_a_stream_stops_with_the_option_that_leaves_it_out() -> None:
    broken = {"prompt": None, "completion": "c"}
    with pytest.raises(DataError, match=r"train row 0 has nothing.* on_bad_row: skip"):
        usable_rows(
            Dataset.from_list([broken, *ROWS]).to_iterable_dataset(),
            Reading(),
            name="train",
            about={},
            on_bad_row="stop",
        )
    with pytest.raises(DataError, match=r"row 5 has nothing.* on_bad_row: skip"):  # when its turn comes
        collate_samples([{**ROWS[0], "__row__": 4}, {**broken, "__row__": 5}])


def test_the_first_row_of_a_stream_is_read_at_once() -> None:
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    with pytest.raises(DataError, match=r"train row 0: the template refuses it.* on_bad_row: skip"):
        usable_rows(stream, Reading(bad=("p0",)), name="train", about={}, on_bad_row="stop")
