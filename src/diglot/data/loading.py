"""A dataset by its name: a file, a folder or a hub id, checked before anything waits for it."""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset

from diglot.data.samples import COLUMNS, to_sample
from diglot.errors import DataError, RenderingError

datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else reading a local file asks a server to count it

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
CHECKED_ROWS = 10_000  # rows read at once to find mistakes early; later ones are checked when their turn comes
REPLY_ROWS = 100  # rows that speak for all when asked whether there are replies


def load_dataset(
    name: str, *, config: str | None = None, split: str = "train", streaming: bool = False
) -> Dataset | IterableDataset:
    """The rows of a hub id, of a .jsonl, .json, .parquet or .csv file, or of a folder of such files.

    A folder may also be what `Dataset.save_to_disk` wrote. Files of a folder belong to the split that their name says
    (train, validation, test); a single file is the split "train". Fields of a .csv file are strings. Every row gets a
    number, `__row__`, from 0, for messages about it.

    Args:
        config: which configuration of a hub dataset.
        split: may be sliced, as in "train[:1000]".
        streaming: read rows when they are needed; then only the first one is checked here.

    Raises:
        DataError: no such file, folder or hub dataset; a file that cannot be read, with the line; columns that are not
            understood; a row that cannot be used.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        data = _from_folder(path, split, streaming)
    elif path.is_file():
        data = _from_file(path, split, streaming)
    else:
        data = _from_hub(name, config, split, streaming)
    return _checked(data, f"{name} ({split})", streaming)


def has_replies(dataset: Dataset | IterableDataset) -> bool:
    """Is there something to learn from without sampling: do the first hundred rows all hold a reply?"""
    rows = list(itertools.islice(dataset, REPLY_ROWS))
    return bool(rows) and all(to_sample(row, f"row {i}").reply is not None for i, row in enumerate(rows))


# ---- where rows come from ----------------------------------------------------------------------------------------


def _from_file(path: Path, split: str, streaming: bool) -> Any:
    builder = BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise DataError(f"{path} ends in {path.suffix!r}, expected one of {', '.join(BUILDERS)}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty. Expected rows with {COLUMNS}.")
    options: dict[str, Any] = {"data_files": str(path), "split": split, "streaming": streaming}
    if builder == "csv":
        # Pandas would turn a column of numbers into numbers and "None" into nothing; text is text here.
        strings = {name: datasets.Value("string") for name in _csv_header(path)}
        options |= {"features": datasets.Features(strings), "keep_default_na": False}
    try:
        return datasets.load_dataset(builder, **options)
    except Exception as error:
        explained = _explain_json(path) if builder == "json" else None
        raise DataError(explained or f"{path} cannot be read: {_first_cause(error)}") from error


def _from_folder(path: Path, split: str, streaming: bool) -> Any:
    try:
        if (path / "dataset_dict.json").exists():
            return _pick_split(path, datasets.load_from_disk(str(path)), split)
        if (path / "state.json").exists():
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset(str(path), split=split, streaming=streaming)
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"The folder {path} cannot be read as a dataset: {_first_cause(error)}\n"
            f"Expected {', '.join(BUILDERS)} files named after their split, or what `Dataset.save_to_disk` wrote."
        ) from error


def _pick_split(path: Path, splits: Any, split: str) -> Dataset:
    if split not in splits:
        raise DataError(f"{path} has the splits {', '.join(sorted(splits))}, not {split!r}.")
    return splits[split]


def _from_hub(name: str, config: str | None, split: str, streaming: bool) -> Any:
    if Path(name).suffix.lower() in BUILDERS or name.startswith((".", "/", "~")) or name.count(os.sep) > 1:
        raise DataError(f"There is no file or folder {name!r} (looked from {Path.cwd()}).")
    try:
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:
        raise DataError(
            f"The dataset {name!r} could not be had: {_first_cause(error)}\n"
            "It is no file or folder here, so it was looked up on the hub. Check the name, the configuration, the "
            "split and the connection."
        ) from error


# ---- checks ------------------------------------------------------------------------------------------------------


def _checked(data: Any, where: str, streaming: bool) -> Any:
    if data.column_names is not None:
        check_columns(data.column_names, where)
    rows = itertools.islice(data, 1 if streaming else CHECKED_ROWS)
    try:
        seen = check_rows(rows, where)
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8: {error.reason} in {error.object[:40]!r}.") from error
    if seen == 0:
        raise DataError(f"{where} has no rows. Expected rows with {COLUMNS}.")
    if "__row__" not in (data.column_names or ()):
        data = data.map(_number, with_indices=True) if streaming else data.add_column("__row__", range(len(data)))
    return data


def check_columns(columns: Iterable[str], where: str) -> None:
    """Raise DataError unless `prompt`, `messages` or `text` is among the columns."""
    seen = sorted(columns)
    if not {"prompt", "messages", "text"} & set(seen):
        raise DataError(
            f"{where} has the columns {', '.join(seen)}, expected {COLUMNS}. Rename yours, for instance with "
            f"`dataset.rename_column({seen[0]!r}, 'prompt')`."
        )


def check_rows(rows: Iterable[Mapping[str, Any]], where: str) -> int:
    """Raise DataError at the first row that cannot be used; the number of rows."""
    number = 0
    for number, row in enumerate(rows, 1):
        try:
            to_sample(row, f"{where} row {number - 1}")
        except RenderingError as error:
            raise DataError(str(error)) from error
    return number


def _number(row: dict[str, Any], index: int) -> dict[str, Any]:
    return {**row, "__row__": index}


# ---- what is wrong with a file -----------------------------------------------------------------------------------


def _csv_header(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return next(csv.reader(file), [])


def _explain_json(path: Path) -> str | None:
    """What is wrong with the first line that is no JSON object."""
    try:
        for number, row in _json_rows(path):
            if not isinstance(row, dict):
                return f"{path} line {number}: {str(row)[:60]!r} is not a JSON object. Expected one with {COLUMNS}."
    except DataError as error:
        return str(error)
    except UnicodeDecodeError as error:
        return f"{path} is not UTF-8: {error.reason} at byte {error.start}."
    return None


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows with their line; those of a JSON list are counted instead."""
    text = path.read_text(encoding="utf-8")
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


def _first_cause(error: BaseException) -> str:
    """The first line of the error below the wrappers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]
