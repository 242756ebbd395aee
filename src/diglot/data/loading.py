"""A dataset by its name: a file, a folder or a hub id, checked before anything waits for it."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets import Dataset, IterableDataset

from diglot.data.files import (
    BUILDERS,
    as_json,
    explain,
    first_cause,
    is_file_name,
    json_features,
    load_file,
    mixes_types,
)
from diglot.data.formats import BAD, FORMATS, OWN, WRITTEN, check_mapping, column_mapping, convert
from diglot.data.recognise import EXPECTED, check_columns, check_format, unread_columns
from diglot.data.samples import to_sample_or_stop
from diglot.errors import ConfigError, DataError, DiglotError
from diglot.quiet import at_level

datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else reading a local file asks a server to count it

logger = logging.getLogger(__name__)

CHECKED_ROWS = 10_000  # rows read at once to find mistakes early; later ones are checked when their turn comes


# What stops the readers of `datasets` is logged by them and raised: here it is said once, by the error.
@at_level("datasets.packaged_modules", logging.CRITICAL)
def load_dataset(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    streaming: bool = False,
    format: str | None = None,
    columns: str | Mapping[str, str] | None = None,
    on_bad_row: str = "stop",
) -> Dataset | IterableDataset:
    """The rows of a hub id, of a file (.jsonl, .json, .parquet, .csv, .tsv, .txt; .gz, .zst), or of a folder of files.

    A folder may also be what `Dataset.save_to_disk` wrote. Files of a folder belong to the split that their name says
    (train, validation, test); a single file is the split "train". Fields of a .csv or .tsv file are strings; each line
    of a .txt file is a row `text`. Every row gets a number, `__row__`, from 0, for messages about it.

    Args:
        config: which configuration of a hub dataset.
        split: may be sliced, as in "train[:1000]".
        streaming: read rows when they are needed; then only the first one is checked here.
        format: how other programs write such rows: "sharegpt", "alpaca", "preference" (what was chosen) or "json_text".
        columns: Diglot's name -> name in the data, as a mapping or as "user=question,assistant=answer". Names are
            `prompt`, `completion`, `messages`, `text`, `tools`, `teacher_prompt`, `teacher` and, for a conversation put
            together from several columns, `user`, `assistant`, `system`, `history`.
        on_bad_row: "stop" at a row that cannot be used, or leave it for the trainer to "skip" and count.

    Raises:
        ConfigError: no such format, or names in `columns` that nothing reads.
        DataError: no such file, folder or hub dataset; a file that cannot be read, with the line; columns that are not
            understood, with the option that says what they are; a row that cannot be used.
    """
    mapping = column_mapping(columns)
    if format is not None and format not in FORMATS:
        raise ConfigError(f"dataset_format={format!r} is none of {', '.join(FORMATS)}.")
    path = Path(name).expanduser()
    if path.is_dir():
        data = _from_folder(path, split, streaming)
    elif path.is_file():
        data = load_file(path, split, streaming)
    else:
        data = _from_hub(name, config, split, streaming)
    where = f"{name} ({split})"
    if not path.is_file() and mixes_types(data.features):
        logger.warning(
            "%s has texts where other rows have lists: the library `datasets` then takes a text that is JSON for what "
            'it says ("42" for a number, "null" for nothing). Named one by one, its files are read as they stand.',
            where,
        )
    # Of a JSON file `datasets` leaves objects with unlike fields as they are; one without columns is read by ourselves.
    # Calls in these formats are JSON text.
    as_text = format in ("json_text", "sharegpt")
    written = as_text or data.info.builder_name == "json" or has_own_nulls(data) is not False
    try:
        first = next(iter(data), None)
        if first is None:
            raise DataError(f"{where} has no rows. Expected rows with {EXPECTED}.")
        if format is not None or mapping is not None:
            check_mapping(mapping or {}, format, list(first), where)
            unread = check_format(format, mapping, list(first), first, where) if format is not None else []
            data = converted(data, format, mapping)
        else:
            unread = check_columns(list(first), first, where)
        if unread:
            logger.warning("%s", unread_columns(where, unread))
        if on_bad_row == "stop":
            check_rows(itertools.islice(data, 1 if streaming else CHECKED_ROWS), where)
    except DiglotError:
        raise
    except UnicodeDecodeError as error:
        reason = explain(path) if path.is_file() else f"{where} is not UTF-8: {error.reason} in {error.object[:40]!r}."
        raise DataError(str(reason)) from error
    except (pyarrow.ArrowException, ValueError) as error:  # a file that is streamed is read here first
        reason = explain(path) if path.is_file() else None
        raise DataError(reason or f"{where} cannot be read: {first_cause(error)}") from error
    return with_row_numbers(data, written)


def converted(data: Any, format: str | None, mapping: Mapping[str, str] | None) -> Any:
    """The rows with Diglot's own columns alone; of one that could not be converted, why."""
    return mapped(data, partial(convert, name=format, mapping=mapping), (*OWN, BAD))


def mapped(data: Any, function: Callable[[Any], dict[str, Any]], names: Sequence[str]) -> Any:
    """What a function makes of each row: the columns `names`, whatever mixture of types the rows have in them."""
    removed = list(next(iter(data)))
    if isinstance(data, IterableDataset):  # its rows stay as they are: nothing is encoded, nor decoded
        return data.map(function, remove_columns=removed)
    return data.map(lambda row: as_json(function(row)), remove_columns=removed, features=json_features(names))


def with_row_numbers(data: Any, written: bool | None = None) -> Any:
    """Rows with their number in `__row__`, from 0, and in `__written__` whether their nulls are their own."""
    if "__row__" in (data.column_names or ()):
        return data
    written = has_own_nulls(data) if written is None else written
    if isinstance(data, IterableDataset):
        return data.map(partial(_number, written=written), with_indices=True)
    return data.add_column("__row__", list(range(len(data)))).add_column(WRITTEN, [written] * len(data))


def has_own_nulls(data: Any) -> bool | None:
    """Is what is None in its rows so by itself? A table fills the fields that a row lacks. None: nothing says so."""
    return None if data.features is None else not any(_has_fields(one) for one in data.features.values())


def _has_fields(feature: Any) -> bool:
    inner = getattr(feature, "feature", None)
    return isinstance(feature, Mapping) or (inner is not None and _has_fields(inner))


def check_rows(rows: Iterable[Mapping[str, Any]], where: str) -> None:
    """Raise DataError at the first row that cannot be used."""
    for number, row in enumerate(rows):
        to_sample_or_stop(row, f"{where} row {number}")


def _number(row: dict[str, Any], index: int, written: bool | None) -> dict[str, Any]:
    return {**row, "__row__": index, WRITTEN: written}


# ---- where rows come from ----------------------------------------------------------------------------------------


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
            f"The folder {path} cannot be read as a dataset: {first_cause(error)}\n"
            f"Expected {', '.join(BUILDERS)} files named after their split, or what `Dataset.save_to_disk` wrote."
        ) from error


def _pick_split(path: Path, splits: Any, split: str) -> Dataset:
    if split not in splits:
        raise DataError(f"{path} has the splits {', '.join(sorted(splits))}, not {split!r}.")
    return splits[split]


def _from_hub(name: str, config: str | None, split: str, streaming: bool) -> Any:
    if is_file_name(name) or name.startswith((".", "/", "~")) or name.count(os.sep) > 1:
        raise DataError(f"There is no file or folder {name!r} (looked from {Path.cwd()}).")
    try:
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:
        raise DataError(
            f"The dataset {name!r} could not be had: {first_cause(error)}\n"
            "It is no file or folder here, so it was looked up on the hub. Check the name, the configuration, the "
            "split and the connection."
        ) from error
