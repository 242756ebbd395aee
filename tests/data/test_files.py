"""Files of every kind and encoding: read, or refused with the file, the line and what to do."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from diglot.data import files, load_dataset, load_sources, to_sample
from diglot.data.loading import with_row_numbers
from diglot.errors import DataError

ROWS = [{"prompt": "Eins?", "completion": "Ja, ça va."}, {"prompt": 'Zwei,\n"drei"?', "completion": "42"}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def zstd(raw: bytes) -> bytes:
    return pytest.importorskip("zstandard").compress(raw)


def read(path: Path) -> list[dict[str, str]]:
    return [{k: row[k] for k in ("prompt", "completion")} for row in load_dataset(str(path))]


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstd), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_packed_files_give_the_same_rows(suffix: str, pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(pack(JSONL))
    assert read(path) == ROWS


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz"])
def test_a_broken_line_of_a_packed_file_is_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes({".gz": gzip.compress, ".zst": zstd, ".xz": lzma.compress}[suffix](JSONL + b'{"prompt":\n'))
    with pytest.raises(DataError, match=r"rows\.jsonl\S* line 3.*not JSON"):
        load_dataset(str(path))


def test_what_is_only_called_packed_cannot_be_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(JSONL)
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz cannot be"):
        load_dataset(str(path))


@pytest.mark.parametrize(("name", "delimiter"), [("d.csv", ","), ("d.csv", ";"), ("d.csv", "|"), ("d.tsv", "\t")])
def test_tables_are_cut_as_their_header_is(name: str, delimiter: str, tmp_path: Path) -> None:
    import csv

    with (tmp_path / name).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([["prompt", "completion"], *([row["prompt"], row["completion"]] for row in ROWS)])
    assert read(tmp_path / name) == ROWS


@pytest.mark.parametrize(("name", "encoding", "message"), [
    ("d.csv", "latin-1", "line 2 is not UTF-8: byte 0xe7. It may be Latin-1"),
    ("d.jsonl", "latin-1", "line 2 is not UTF-8: byte 0xe7"),
    ("d.txt", "latin-1", "line 2 is not UTF-8: byte 0xe7"),
    ("d.jsonl", "utf-16", "line 1 is not UTF-8: byte 0xff. It is UTF-16"),
    ("d.csv", "utf-16", "It is UTF-16.*iconv -f UTF-16 -t UTF-8 d.csv"),
])  # fmt: skip
def test_another_encoding_is_named_with_its_line(name: str, encoding: str, message: str, tmp_path: Path) -> None:
    header = "prompt,completion\n" if name == "d.csv" else '{"prompt": "a", "completion": "b"}\n'
    text = header + ('a,"ça va"\n' if name == "d.csv" else '{"prompt": "a", "completion": "ça va"}\n')
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(DataError, match=message):
        load_dataset(str(tmp_path / name))


def test_lines_of_a_text_file_are_rows_and_blank_ones_are_none(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("one\n\n  \ntwo 数学\n", encoding="utf-8")
    assert [row["text"] for row in load_dataset(str(tmp_path / "d.txt"))] == ["one", "two 数学"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "jsonl.gz", "jsonl.xz"])
def test_a_text_that_is_json_stays_a_text_beside_lists(suffix: str, streaming: bool, tmp_path: Path) -> None:
    message = {"role": "user", "content": "7"}
    rows = [{"prompt": "42", "completion": "null"}, {"prompt": [message], "completion": '"q"'}]
    lines = "".join(json.dumps(row) + "\n" for row in rows) if "jsonl" in suffix else json.dumps(rows)
    packed = {"gz": gzip.compress, "xz": lzma.compress}.get(suffix.rpartition(".")[2], bytes)
    path = tmp_path / f"d.{suffix}"
    path.write_bytes(packed(lines.encode()))
    read = [{name: row[name] for name in rows[0]} for row in load_dataset(str(path), streaming=streaming)]
    assert read == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,completion\na,b,c\n", r"line 2 has 3 fields and the header 2: \['a', 'b', 'c'\]"),
        ('prompt,completion\n"a\n",b\nc\n', r"line 4 has 1 fields and the header 2: \['c'\]"),
        ('prompt,completion\na,b\n"c,d\n', r"line 3: unexpected end of data"),
        ('prompt,completion\n"a" b,c\n', r"line 2: ',' expected after"),
        ("prompt,prompt\na,b\n", "has 2 columns named 'prompt'"),
        ("prompt,completion\n\n", "has no rows below its header prompt, completion"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_table_whose_rows_are_not_as_long_as_its_header_is_refused(
    text: str, message: str, streaming: bool, tmp_path: Path
) -> None:
    (tmp_path / "d.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_dataset(str(tmp_path / "d.csv"), streaming=streaming)


def test_a_mark_of_the_byte_order_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("one\n", encoding="utf-8-sig")
    assert [row["text"] for row in load_dataset(str(tmp_path / "d.txt"))] == ["one"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"prompt": "a", "prompt": "b"}\n' * 2, "line 1 has 'prompt' 2 times in one object"),
        (b'[{"prompt": "a"},]', "line 1, column 18: this is not JSON"),
        (JSONL.decode().encode("utf-16-le"), "It is UTF-16 without a mark. Convert it: iconv -f UTF-16LE"),
        (gzip.compress(JSONL, mtime=0), r"is packed \(.gz\), and its name does not say so"),
    ],
)
def test_a_stream_that_cannot_be_read_says_why(raw: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(raw)
    with pytest.raises(DataError, match=message):
        load_dataset(str(tmp_path / "d.jsonl"), streaming=True)


def calling(arguments: object) -> dict[str, object]:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


ASK = {"role": "user", "content": "Why?"}
NULLS = [{"a": 1, "b": None}, {"c": "x"}, {}, {"a": 2, "b": {"d": [None]}}]


def arguments_of(data: Any) -> list[Any]:
    samples = [to_sample(row, "row") for row in data]
    return [json.loads(sample.answer.text[1:]) for sample in samples if sample.answer is not None]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("shape", ["messages", "completion"])
def test_a_null_of_a_json_file_stays_and_one_that_a_table_filled_in_is_gone(
    shape: str, streaming: bool, tmp_path: Path
) -> None:
    rows: list[dict[str, object]] = [{"prompt": [ASK], "completion": [calling(one)]} for one in NULLS]
    if shape == "messages":
        rows = [{"messages": [ASK, calling(one)]} for one in NULLS]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "list.json").write_text(json.dumps(rows), encoding="utf-8")
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(str(tmp_path / "rows.parquet"))
    options: dict[str, Any] = {"streaming": streaming}
    for name in ("rows.jsonl", "list.json"):
        assert arguments_of(load_dataset(str(tmp_path / name), **options)) == NULLS
        mapped = load_dataset(str(tmp_path / name), columns=",".join(rows[0]), **options)
        assert arguments_of(mapped) == NULLS
    filled = [{"a": 1}, {"c": "x"}, {}, {"a": 2, "b": {"d": [None]}}]
    of_parquet = str(tmp_path / "rows.parquet")
    for data in (load_dataset(of_parquet, **options), load_dataset(of_parquet, columns=",".join(rows[0]), **options)):
        assert arguments_of(data) == filled
    if not streaming:
        assert arguments_of(load_sources([of_parquet, str(lines)], split="train")) == [*filled, *NULLS]
        assert arguments_of(with_row_numbers(table)) == filled


def test_a_null_in_json_text_stays_in_a_table_too(tmp_path: Path) -> None:
    value = json.dumps({"name": "f", "arguments": NULLS[0]})
    turns = [{"from": "human", "value": "Why?"}, {"from": "function_call", "value": value}]
    rows = [{"conversations": turns}, {"conversations": turns}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    assert arguments_of(load_dataset(str(tmp_path / "rows.parquet"), format="sharegpt")) == [NULLS[0]] * 2


def test_a_slice_is_taken_of_a_file_whose_columns_mix_texts_and_lists(tmp_path: Path) -> None:
    prompts = [[{"role": "user", "content": "q"}] if i % 2 else "q" for i in range(6)]
    rows = [{"prompt": prompt, "completion": str(i)} for i, prompt in enumerate(prompts)]
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert [row["completion"] for row in load_dataset(str(path), split="train[1:3]")] == ["1", "2"]
    with pytest.raises(DataError, match="Unknown split"):
        load_dataset(str(path), split="nonsense")


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_with_other_fields_late_in_a_long_file_are_read(streaming: bool, tmp_path: Path) -> None:
    """The library fixes the columns by the first 10 MB."""
    early = json.dumps({"messages": [ASK, calling({"a": "x" * 100_000})]})
    late = json.dumps({"messages": [ASK, calling({"a": "y", "b": None})]})
    path = tmp_path / "long.jsonl"
    path.write_text(f"{early}\n" * 110 + f"{late}\n", encoding="utf-8")
    assert arguments_of(load_dataset(str(path), streaming=streaming))[-1] == {"a": "y", "b": None}


def test_a_list_that_is_streamed_is_looked_through_once_before_its_rows_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    opened: list[Path] = []
    real = files._json_rows

    def counting(path: Path) -> Any:
        opened.append(path)
        return real(path)

    monkeypatch.setattr(files, "_json_rows", counting)
    files.load_file(path, "train", True)
    assert len(opened) == 1


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_that_cannot_be_read_is_one_message(name: str, streaming: bool, tmp_path: Path) -> None:
    """In a program of its own: what `datasets` writes to standard error goes past pytest's capture."""
    (tmp_path / name).write_bytes(b'{"prompt": "a", "completion": "b"}\n{broken\n')
    program = f"""
from diglot.data import load_dataset
from diglot.errors import DataError
try:
    load_dataset({str(tmp_path / name)!r}, streaming={streaming})
except DataError:
    print("refused")
"""
    quiet = {**os.environ, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=quiet, check=True)
    assert (done.stdout, done.stderr) == ("refused\n", "")
