"""Datasets by name, the less usual: streams, slices, changed files, text that looks like numbers, broken lines."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from diglot.data import load_dataset
from diglot.errors import DataError

# `datasets` leaves a file that it streams open until it is collected: done here, where it is expected.
pytestmark = pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


ROWS = [{"prompt": "One", "completion": " two"}, {"prompt": "naïve 数学", "completion": " 42"}]


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write(path: Path) -> str:
    if path.suffix == ".jsonl":
        return write_jsonl(path, ROWS)
    if path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif path.suffix == ".parquet":
        Dataset.from_list(ROWS).to_parquet(path)
    else:
        Dataset.from_list(ROWS).to_csv(path, index=False)
    return str(path)


def plain(dataset: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("__")} for row in dataset]


def test_csv_fields_are_text_whatever_they_look_like(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("prompt,completion\n1,None\n007,2020-01-01\n")
    assert plain(load_dataset(str(path))) == [
        {"prompt": "1", "completion": "None"},
        {"prompt": "007", "completion": "2020-01-01"},
    ]


def test_a_split_can_be_sliced(tmp_path: Path) -> None:
    assert plain(load_dataset(write(tmp_path / "d.jsonl"), split="train[:1]")) == ROWS[:1]


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    name = write(tmp_path / "d.jsonl")
    assert len(load_dataset(name)) == 2
    write_jsonl(tmp_path / "d.jsonl", [*ROWS, {"prompt": "three", "completion": "!"}])
    assert len(load_dataset(name)) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": "b"\n', "line 2, column 15: this is not JSON"),
        ('{"prompt": "a"}\n\nplain\n', "line 3, column 1: this is not JSON"),
        ('{"prompt": "a"}\n[1]\n', "line 2: '[1]' is not a JSON object"),
        ('[{"prompt": "a"},\n {"prompt" "b"}]', "line 2"),
        ("", "is empty"),
    ],
)
def test_a_broken_line_of_json_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        load_dataset(str(path))
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("row", "column"),
    [
        (r'{"prompt": "c", "completion": "cut \ud83d"}', "completion"),
        (r'{"messages": [{"role": "user", "content": "\ude00 cut"}]}', "messages"),
        (r'{"prompt": "c", "note": "\ud83d, which nothing reads"}', "note"),
    ],
)
def test_half_of_a_surrogate_pair_in_a_file_is_named_by_line_and_column(
    tmp_path: Path, row: str, column: str, streaming: bool
) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_text(r'{"prompt": "a whole one: \ud83d\ude00"}' + f"\n\n{row}\n")
    with pytest.raises(DataError, match=rf"cut\.jsonl line 3 holds the lone surrogate U\+D[8E]\w\w in `{column}`"):
        load_dataset(str(path), streaming=streaming)


def test_plain_and_conversational_rows_may_stand_in_one_file(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}]
    assert plain(load_dataset(write_jsonl(tmp_path / "d.jsonl", rows))) == rows


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "café"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl.*UTF-8"):
        load_dataset(str(path))


@pytest.mark.parametrize("streaming", [False, True])
def test_unknown_columns_are_listed_with_those_that_would_do(tmp_path: Path, streaming: bool) -> None:
    name = write_jsonl(tmp_path / "d.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(
        DataError, match=r"columns answer, question: .*--dataset_columns user=question,assistant=answer"
    ):
        load_dataset(name, streaming=streaming)


def test_an_unknown_ending_and_a_folder_without_data_are_errors(tmp_path: Path) -> None:
    (tmp_path / "data.xyz").write_text("a")
    with pytest.raises(DataError, match=r"ends in '\.xyz', expected one of \.jsonl"):
        load_dataset(str(tmp_path / "data.xyz"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be read as a dataset"):
        load_dataset(str(tmp_path / "empty"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("row", [
    {"prompt": None, "completion": "c"},
    {"messages": [{"role": "user", "content": None}]},
    {"prompt": "a", "images": ["a.png"]},
    {"prompt": ""},
])  # fmt: skip
def test_a_bad_row_stops_with_the_option_that_leaves_it_out(tmp_path: Path, row: Any, streaming: bool) -> None:
    name = write_jsonl(tmp_path / "d.jsonl", [row, *ROWS])
    with pytest.raises(DataError, match=r"row 0[ :].*on_bad_row: skip"):
        load_dataset(name, streaming=streaming)
    assert len(plain(load_dataset(name, streaming=streaming, on_bad_row="skip"))) == 3


def test_columns_are_not_called_unread_because_the_first_row_has_nothing_in_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_dataset(write_jsonl(tmp_path / "d.jsonl", [{"prompt": None, "completion": "c"}, *ROWS]), on_bad_row="skip")
    assert "nothing reads" not in caplog.text
