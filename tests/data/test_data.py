"""Datasets by name, and rows as samples: what is accepted, and what is refused with the row and the file named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from diglot.data import Sample, load_dataset, to_sample
from diglot.errors import DataError

ROWS = [{"prompt": "One?", "completion": "Yes."}, {"prompt": "Two, naïve 数学?", "completion": "No.\r\n"}]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    {
        ".jsonl": lambda: path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8"),
        ".json": lambda: path.write_text(json.dumps(rows), encoding="utf-8"),
        ".parquet": lambda: Dataset.from_list(rows).to_parquet(str(path)),
        ".csv": lambda: Dataset.from_list(rows).to_csv(str(path), index=False),
    }[path.suffix]()
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_files_of_every_kind_give_the_same_rows(suffix: str, tmp_path: Path) -> None:
    data = load_dataset(write(tmp_path / f"data{suffix}", ROWS))
    assert [{k: r[k] for k in ("prompt", "completion")} for r in data] == ROWS
    assert [r["__row__"] for r in data] == [0, 1]


def test_folders_by_split_and_saved_datasets(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    write(folder / "train.jsonl", ROWS)
    write(folder / "test.jsonl", ROWS[:1])
    assert (len(load_dataset(str(folder))), len(load_dataset(str(folder), split="test"))) == (2, 1)
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "saved"))
    assert len(load_dataset(str(tmp_path / "saved"))) == 2
    with pytest.raises(DataError, match="splits train, not 'test'"):
        load_dataset(str(tmp_path / "saved"), split="test")


def test_streaming_gives_the_same_rows(tmp_path: Path) -> None:
    data = load_dataset(write(tmp_path / "d.jsonl", ROWS), streaming=True)
    assert [r["prompt"] for r in data] == [r["prompt"] for r in ROWS]


@pytest.mark.parametrize(("text", "message"), [
    ('{"prompt": "a"}\n{"prompt": \n', "line 2"), ("", "is empty"), ('{"question": "a"}\n', "columns question"),
    ('{"prompt": "a"}\n{"prompt": 3}\n', "row 1: `prompt` is 3"), ('{"prompt": ""}\n', "row 0.*empty"),
])  # fmt: skip
def test_a_broken_file_is_named_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(str(tmp_path / "d.jsonl"))
    assert "d.jsonl" in str(caught.value)


@pytest.mark.parametrize("name", ["/nowhere/d.jsonl", "./none.csv", "d.docx"])
def test_a_missing_file_is_not_looked_up_elsewhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.docx").write_text("x")
    with pytest.raises(DataError, match=r"no file|ends in '.docx'"):
        load_dataset(name)


def test_an_unreachable_hub_dataset_is_one_message() -> None:
    with pytest.raises(DataError, match="could not be had"):
        load_dataset("some-org/some-data")


USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(("row", "messages", "text", "reply"), [
    ({"prompt": "a"}, None, "a", None),
    ({"prompt": "a", "completion": "b"}, None, "a", "b"),
    ({"prompt": "a", "completion": None}, None, "a", None),
    ({"text": "t"}, None, "", "t"),
    ({"prompt": [USER]}, (USER,), "", None),
    ({"prompt": [USER], "completion": "b"}, (USER,), "", "b"),
    ({"prompt": [USER], "completion": [ASSISTANT]}, (USER,), "", "Hello"),
    ({"messages": [USER, ASSISTANT]}, (USER,), "", "Hello"),
    ({"messages": [USER, ASSISTANT, USER]}, (USER, ASSISTANT, USER), "", None),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ASSISTANT]},
     ({"role": "user", "content": [{"type": "text", "text": "Hi"}]},), "", "Hello"),
])  # fmt: skip
def test_every_accepted_shape_of_a_row(row: dict[str, Any], messages: Any, text: str, reply: str | None) -> None:
    result = to_sample(row, "row 1")
    assert isinstance(result, Sample) and result.where == "row 1" and result.reply == reply
    assert result.conversation.messages == messages and result.conversation.text == text


@pytest.mark.parametrize("row", [
    {}, {"question": "a"}, {"prompt": 3}, {"prompt": []}, {"prompt": "a", "completion": 3}, {"text": 1},
    {"messages": "x"}, {"messages": [ASSISTANT]}, {"messages": [{"content": "x"}]}, {"messages": ["x"]},
    {"prompt": [USER], "completion": [USER]},
])  # fmt: skip
def test_rows_that_cannot_be_used_are_named(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="data row 9"):
        to_sample(row, "data row 9")


def test_a_tool_call_keeps_its_empty_content() -> None:
    """Some templates write a call only where the content is null; a table fills other missing fields with null."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}], "name": None}
    row = {"messages": [USER, call, {"role": "tool", "content": "1", "tool_calls": None}, ASSISTANT]}
    messages = to_sample(row, "row").conversation.messages
    assert messages is not None
    assert messages[1] == {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    assert messages[2] == {"role": "tool", "content": "1"}
