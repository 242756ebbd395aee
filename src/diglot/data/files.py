"""Local files as rows: which reader, which delimiter, and what is wrong with one that cannot be read."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets.exceptions import DatasetGenerationError

from diglot.data.recognise import EXPECTED
from diglot.data.samples import LONGEST, lone_surrogate
from diglot.errors import DataError

logger = logging.getLogger(__name__)

BUILDERS = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet",
    ".csv": "csv", ".tsv": "csv", ".txt": "text",
}  # fmt: skip
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
DELIMITERS = (",", ";", "\t", "|")
_ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_PACKED = {b"\x1f\x8b": ".gz", b"\x28\xb5": ".zst", b"BZ": ".bz2", b"\xfd7": ".xz", b"PK": ".zip"}


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
        if builder == "text":
            options["encoding"] = "utf-8-sig"  # a mark of the byte order is no text
        data = datasets.load_dataset(builder, **options)
        if builder == "json" and data.features is None:  # the stream of a list, whose mixed columns come as JSON text
            return _as_written(path, _names(path), split, streaming)
        if builder == "json" and mixes_types(data.features):
            return _as_written(path, tuple(data.features), split, streaming)
        return data.filter(_has_text) if builder == "text" else data
    except DataError:
        raise
    except Exception as error:
        reason = explain(path)
        if reason is None and builder == "json" and isinstance(error, DatasetGenerationError):
            return _as_written(path, _names(path), split, streaming)  # rows behind the first 10 MB have other fields
        raise DataError(reason or f"{path} cannot be read: {first_cause(error)}") from error


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


# ---- columns of texts beside lists ---------------------------------------------------------------------------------


def json_features(names: Iterable[str]) -> datasets.Features:
    """Columns whose values may have any type, from row to row."""
    return datasets.Features(dict.fromkeys(names, datasets.Json()))


def as_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row for such columns. Left to itself the library takes a text that is JSON for what it says: "42" for a number,
    "null" for nothing."""
    return {name: None if value is None else json.dumps(value) for name, value in row.items()}


def mixes_types(features: Any, in_list: bool = False) -> bool:
    """May a text stand in a place where other rows have a list? What stands in a list of such are messages or calls."""
    if isinstance(features, datasets.Json):
        return not in_list
    if isinstance(features, Mapping):
        return any(mixes_types(one) for one in features.values())
    inner = getattr(features, "feature", None)
    return inner is not None and mixes_types(inner, in_list=True)


def _as_written(path: Path, names: tuple[str, ...], split: str, streaming: bool) -> Any:
    """The rows of a JSON file, texts as texts whatever they say; `split` may be sliced where they are not streamed."""
    if streaming:
        return datasets.IterableDataset.from_generator(_rows, gen_kwargs={"path": path, "names": names})
    read_at = path.stat()
    options = {"path": path, "names": names, "encoded": True, "version": (read_at.st_size, read_at.st_mtime_ns)}
    data = datasets.Dataset.from_generator(_rows, features=json_features(names), gen_kwargs=options)
    slices = datasets.ReadInstruction.from_spec(split).to_absolute({"train": len(data)})
    return data.select([i for one in slices for i in range(one.from_, one.to)]) if "[" in split else data


def _names(path: Path) -> tuple[str, ...]:
    """The columns of a JSON file, in the order in which they come. Raises `DataError` for what is wrong with a row."""
    names: dict[str, None] = {}
    for number, row in _json_rows(path):
        if (wrong := _wrong(path, number, row)) is not None:
            raise DataError(wrong)
        names |= dict.fromkeys(row)
    return tuple(names)


def _rows(path: Path, names: tuple[str, ...], encoded: bool = False, version: Any = None) -> Iterator[dict[str, Any]]:
    """`version` makes another key of the library's cache for a file that has changed."""
    for number, row in _json_rows(path):
        if not isinstance(row, dict):
            raise DataError(_no_object(path, number, row))
        row = {name: row.get(name) for name in names}
        yield as_json(row) if encoded else row


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
    text.seek(0)
    _check_fields(text, delimiter, header, path)
    strings = {name: datasets.Value("string") for name in header}
    return {"features": datasets.Features(strings), "keep_default_na": False, "sep": delimiter}


def _check_fields(text: io.StringIO, delimiter: str, header: list[str], path: Path) -> None:
    """Every row has as many fields as the header: pandas would shift them, or fill up what is missing.

    Raises:
        DataError: with the line.
    """
    if twice := [name for name in header if header.count(name) > 1]:
        raise DataError(f"{path} has {header.count(twice[0])} columns named {twice[0]!r}, expected each name once.")
    csv.field_size_limit(LONGEST)  # of the whole process; what it has by itself is less than a long text
    rows, begins, number = csv.reader(text, delimiter=delimiter, strict=True), 1, 0
    try:
        for row in rows:
            if row and len(row) != len(header):
                raise DataError(
                    f"{path} line {begins} has {len(row)} fields and the header {len(header)}: {row!r:.80}. Put "
                    f"quotes around a field that has {delimiter!r} in it."
                )
            begins, number = rows.line_num + 1, number + bool(row)
    except csv.Error as error:
        raise DataError(
            f"{path} line {begins}: {error}. Put quotes around the whole field, and write each one in it twice."
        ) from error
    if number < 2:
        raise DataError(f"{path} has no rows below its header {', '.join(header)}.")


# ---- what is wrong with a file -----------------------------------------------------------------------------------


def _opened(path: Path) -> Any:
    """A file to read from, unpacked."""
    if path.suffix.lower() == ".xz":
        import lzma

        return lzma.open(path)
    return pyarrow.input_stream(str(path))


def _bytes(path: Path) -> bytes:
    with _opened(path) as stream:
        return bytes(stream.read())


def _text(path: Path) -> str:
    return _bytes(path).decode("utf-8-sig")


def _not_utf8(path: Path) -> str | None:
    raw = _bytes(path)
    if b"\0" in raw[:2]:
        encoding = "UTF-16BE" if raw[:1] == b"\0" else "UTF-16LE"
        return _converted(path, "byte 0x00. It is UTF-16 without a mark.", encoding)
    try:
        raw.decode("utf-8")
        return None
    except UnicodeDecodeError as error:
        line, byte = raw.count(b"\n", 0, error.start) + 1, raw[error.start]
    if packed := _PACKED.get(raw[:2]):
        return f"{path} is packed ({packed}), and its name does not say so: unpack it."
    encoding = _ENCODINGS.get(raw[:2], "LATIN1")
    meant = "It may be Latin-1 (ISO-8859-1)." if encoding == "LATIN1" else f"It is {encoding}."
    return _converted(path, f"byte 0x{byte:02x}. {meant}", encoding, line)


def _converted(path: Path, why: str, encoding: str, line: int = 1) -> str:
    """That a file is not UTF-8, and the command that makes it so."""
    return (
        f"{path} line {line} is not UTF-8: {why} Convert it: "
        f"iconv -f {encoding} -t UTF-8 {path.name} > utf8-{path.name}"
    )


def _no_object(path: Path, line: int, row: Any) -> str:
    return f"{path} line {line}: {str(row)[:60]!r} is not a JSON object. Expected one with {EXPECTED}."


def _not_json(path: Path) -> str | None:
    return next((wrong for number, row in _json_rows(path) if (wrong := _wrong(path, number, row))), None)


def _wrong(path: Path, line: int, row: Any) -> str | None:
    if not isinstance(row, dict):
        return _no_object(path, line, row)
    for name, value in row.items():  # of any column: one such string and the whole file cannot be read
        if (half := lone_surrogate(value)) is not None:
            return (
                f"{path} line {line} holds the lone surrogate U+{ord(half):04X} in `{name}`, expected Unicode text: it "
                "was probably cut in the middle of an emoji. Mend the line, or take it out of the file."
            )
    return None


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows with their line; those of a JSON list are counted instead."""
    with _opened(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n") as lines:
        written = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
        for k, (number, line) in enumerate(written):
            if k == 0 and line.lstrip().startswith("["):
                yield from enumerate(_parse(line + lines.read(), path, number), 1)
                return
            yield number, _parse(line.rstrip("\n"), path, number)


def _nothing(_: str) -> None:
    """What NaN means in a file: pandas writes it where there is no value."""


def _parse(text: str, path: Path, line: int) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """An object whose names stand once: of two values one would be lost."""
        if len(pairs) != len(dict(pairs)):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(
                f"{path} line {line} has {twice!r} {names.count(twice)} times in one object, expected once."
            )
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=_nothing)
    except json.JSONDecodeError as error:
        place = f"{path} line {line + error.lineno - 1}, column {error.colno}"
        raise DataError(f"{place}: this is not JSON: {error.msg}.") from error
