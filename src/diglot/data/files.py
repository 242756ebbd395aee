"""Local files as rows: which reader, which delimiter, and what is wrong with one that cannot be read."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from diglot.data.recognise import EXPECTED
from diglot.data.samples import lone_surrogate
from diglot.errors import DataError

logger = logging.getLogger(__name__)

BUILDERS = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet",
    ".csv": "csv", ".tsv": "csv", ".txt": "text",
}  # fmt: skip
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
DELIMITERS = (",", ";", "\t", "|")
_ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def is_file_name(name: str) -> bool:
    """Does a name end like one of a file that can be read?"""
    suffixes = [s.lower() for s in Path(name).suffixes[-2:]]
    return bool(suffixes) and (suffixes[-1] in BUILDERS or (suffixes[-1] in COMPRESSED and suffixes[0] in BUILDERS))


def load_file(path: Path, split: str, streaming: bool) -> Any:
    """The rows of one file.

    Raises:
        DataError: a kind of file that is not read, or one that is empty or broken, with the line where there are lines.
    """
    builder = _builder(path)
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty. Expected rows with {EXPECTED}.")
    options: dict[str, Any] = {"data_files": str(path), "split": split, "streaming": streaming}
    try:
        if builder == "csv":
            options |= _csv_options(path)
        data = datasets.load_dataset(builder, **options)
        return data.filter(_has_text) if builder == "text" else data
    except DataError:
        raise
    except Exception as error:
        raise DataError(explain(path) or f"{path} cannot be read: {first_cause(error)}") from error


def explain(path: Path) -> str | None:
    """What is wrong with a file: its first line that is not UTF-8 or, of a JSON file, no JSON object or not Unicode
    text; None: nothing that was looked for."""
    builder = _builder(path)
    if builder == "parquet":
        return None
    try:
        return _not_utf8(path) or (_not_json(path) if builder == "json" else None)
    except DataError as error:
        return str(error)
    except (OSError, EOFError, pyarrow.ArrowException) as error:
        return f"{path} cannot be unpacked: {first_cause(error)}"


def first_cause(error: BaseException) -> str:
    """The first line of the error below the wrappers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _builder(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED else ""
    builder = BUILDERS.get(suffixes[-1]) if suffixes else None
    if builder is None or (packed and builder == "parquet"):
        raise DataError(
            f"{path} ends in {''.join(path.suffixes[-2:] if packed else path.suffixes[-1:])!r}, expected one of "
            f"{', '.join(BUILDERS)}, the text files among them also packed ({', '.join(COMPRESSED)})."
        )
    if packed == ".zst" and importlib.util.find_spec("zstandard") is None:
        raise DataError(f"{path} is packed with zstd: install the package zstandard, or unpack it (zstd -d).")
    return builder


def _has_text(row: dict[str, Any]) -> bool:
    """Blank lines of a text file are no rows."""
    return bool(row["text"].strip())


# ---- tables ------------------------------------------------------------------------------------------------------


def _csv_options(path: Path) -> dict[str, Any]:
    """The delimiter is the one that cuts the header into most names; every field is text.

    Pandas would turn a column of numbers into numbers and "None" into nothing.
    """
    if (wrong := _not_utf8(path)) is not None:
        raise DataError(wrong)
    text = io.StringIO(_text(path), newline="")
    cut = {}
    for delimiter in DELIMITERS:
        text.seek(0)
        cut[delimiter] = next(csv.reader(text, delimiter=delimiter), [])
    delimiter, header = max(cut.items(), key=lambda item: len(item[1]))
    if delimiter != "," and ".tsv" not in path.suffixes:
        logger.warning("%s is read with %r between its fields, as its header is written.", path, delimiter)
    strings = {name: datasets.Value("string") for name in header}
    return {"features": datasets.Features(strings), "keep_default_na": False, "sep": delimiter}


# ---- what is wrong with a file -----------------------------------------------------------------------------------


def _bytes(path: Path) -> bytes:
    """What is in a file, unpacked."""
    if path.suffix.lower() == ".xz":
        import lzma

        return lzma.decompress(path.read_bytes())
    with pyarrow.input_stream(str(path)) as stream:
        return bytes(stream.read())


def _text(path: Path) -> str:
    return _bytes(path).decode("utf-8-sig")


def _not_utf8(path: Path) -> str | None:
    raw = _bytes(path)
    try:
        raw.decode("utf-8")
        return None
    except UnicodeDecodeError as error:
        line, byte = raw.count(b"\n", 0, error.start) + 1, raw[error.start]
        encoding = _ENCODINGS.get(raw[:2])
    meant = f"It is {encoding}." if encoding else "It may be Latin-1 (ISO-8859-1)."
    name = encoding or "LATIN1"
    return (
        f"{path} line {line} is not UTF-8: byte 0x{byte:02x}. {meant} Convert it: "
        f"iconv -f {name} -t UTF-8 {path.name} > utf8-{path.name}"
    )


def _not_json(path: Path) -> str | None:
    for number, row in _json_rows(path):
        if not isinstance(row, dict):
            return f"{path} line {number}: {str(row)[:60]!r} is not a JSON object. Expected one with {EXPECTED}."
        for name, value in row.items():  # of any column: one such string and the whole file cannot be read
            if (half := lone_surrogate(value)) is not None:
                return (
                    f"{path} line {number} holds the lone surrogate U+{ord(half):04X} in `{name}`, expected Unicode "
                    "text: it was probably cut in the middle of an emoji. Mend the line, or take it out of the file."
                )
    return None


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows with their line; those of a JSON list are counted instead."""
    text = _text(path)
    if text.lstrip().startswith("["):
        yield from enumerate(_parse(text, path, 1), 1)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, _parse(line, path, number)


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path} line {line + error.lineno - 1}, column {error.colno}"
        raise DataError(f"{place}: this is not JSON: {error.msg}.") from error
