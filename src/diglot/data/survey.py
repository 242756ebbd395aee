"""Every row read once before training: which cannot be used, which do not fit, and what nobody would have said.

Reading is what the trainer hands in: each row is rendered on both sides as it will be in training. What was found is
kept in `rows` in `DIGLOT_CACHE` (default `~/.cache/diglot`; `off` keeps nothing), under a hash of the rows, of what
reads them and of the code that does; the folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from datasets.utils import tqdm

from diglot.data.loading import with_row_numbers
from diglot.data.recognise import check_columns, check_routes, unread_columns
from diglot.data.samples import LEAVE_OUT, Sample, to_sample
from diglot.disk import cache_folder, code_digest, write_whole
from diglot.errors import DataError, DiglotError

logger = logging.getLogger(__name__)

LEAST = 1000  # rows from which on the result is kept: below that, reading them takes a second or two
_ROUTED = 100  # rows that say whether a column names teachers
_NAMED = 5  # reasons, or rows, that a message gives
_CODE = ("data", "vocabulary", "rendering", "batches")  # packages that decide what can be read

Read = Callable[[Sample], bool]
"""Reads a sample on both sides: False if it does not fit. Raises `DiglotError` if it cannot be read."""


@dataclass
class Survey:
    """What was found about the rows of a dataset, by their place in it."""

    bad: dict[int, str] = field(default_factory=dict)  # why it cannot be used
    too_long: list[int] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)  # the numbers of rows whose reply has no text and no call
    plain_prompts: int = 0  # prompts that are text, not messages


def usable_rows(
    data: Any,
    read: Read,
    *,
    name: str,
    about: Mapping[str, Any],
    on_bad_row: str,
    templates: bool = False,
    replies: bool = False,
    labels: Sequence[str] = (),
) -> Any:
    """The rows that can be trained on, and a word about the others.

    Of a stream the first row is read at once, and the others as they come: with `on_bad_row="skip"` on both sides, and
    those that cannot be used are left out and named; else only their shape is looked at.

    Args:
        name: of the dataset, for messages.
        about: what reads the rows, as plain values: part of the key under which the result is kept.
        on_bad_row: "stop" or "skip".
        templates: have both models a chat template?
        replies: are the rows' own replies trained on?
        labels: of several teachers, to which rows may be routed.

    Raises:
        DataError: the columns are not understood; a row cannot be used and `on_bad_row` is "stop"; no row is left.
    """
    if isinstance(data, IterableDataset):
        return _usable_stream(data, read, name, on_bad_row, replies)
    if len(data) == 0:
        raise DataError(f"{name} has no rows.")
    if isinstance(data, Dataset):
        unread = check_columns(data.column_names, data[0], name)
        if unread and "__row__" not in data.column_names:  # else `load_dataset` said so
            logger.warning("%s", unread_columns(name, unread))
        check_routes(data.column_names, [data[i] for i in range(min(len(data), _ROUTED))], labels, name)
        data = with_row_numbers(data)
    result = _surveyed(data, read, name, about)
    _tell(result, len(data), name, on_bad_row, templates)
    if replies and result.empty:
        _tell_empty(len(result.empty), len(data), name, result.empty)
    if not result.bad:
        return data
    if not isinstance(data, Dataset):
        raise DataError(f"{name} is {type(data).__name__}, of which no rows can be left out. Give a datasets.Dataset.")
    usable = [i for i in range(len(data)) if i not in result.bad]
    return data.select(usable)


def names_teachers(data: Any) -> bool:
    """Does a row say which teacher reads it? The first hundred speak for a stream."""
    if isinstance(data, IterableDataset):
        return any(row.get("teacher") is not None for row in itertools.islice(data, _ROUTED))
    if isinstance(data, Dataset):
        return "teacher" in data.column_names and any(name is not None for name in data["teacher"])
    return any(data[i].get("teacher") is not None for i in range(len(data)))


def survey(rows: Iterable[Mapping[str, Any]], read: Read, name: str) -> Survey:
    """Read every row once."""
    result = Survey()
    for i, row in enumerate(rows):
        try:
            sample = to_sample(row, where(row, i, name))
            result.plain_prompts += sample.conversation.messages is None and bool(sample.conversation.text)
            if not read(sample):
                result.too_long.append(i)
            elif sample.reply is not None and not (sample.answer.text if sample.answer else sample.reply):
                result.empty.append(_number(row, i))
        except DiglotError as error:
            result.bad[i] = naming(where(row, i, name), error)
    return result


def where(row: Mapping[str, Any], place: int, name: str) -> str:
    """How messages name a row."""
    return f"{name} row {_number(row, place)}"


def naming(place: str, error: Exception) -> str:
    """What was wrong, with the row's name before it unless the message has it."""
    return str(error) if place in str(error) else f"{place}: {error}"


def _number(row: Mapping[str, Any], place: int) -> str:
    number = row.get("__row__")
    return str(place if number is None else number)


def _tell(result: Survey, rows: int, name: str, on_bad_row: str, templates: bool) -> None:
    """Say what was found; raise where nothing can follow from it."""
    bad, long = len(result.bad), len(result.too_long)
    if bad:
        first = _reasons(result.bad, name)
        if on_bad_row == "stop" or bad == rows:
            advice = "" if bad == rows else "\nMend them, or leave them out: on_bad_row: skip."
            raise DataError(f"{bad} of {rows} rows of {name} cannot be used. The first:\n{first}{advice}")
        logger.warning("%d of %d rows of %s cannot be used and are left out (on_bad_row):\n%s", bad, rows, name, first)
    if long and bad + long == rows:
        raise DataError(
            f"No row of {name} fits: the prompts of {long} alone fill max_length (with what max_completion_length asks "
            "for) or teacher_max_length. Raise them, or give shorter prompts."
        )
    if long:
        logger.warning("%d of %d rows of %s do not fit max_length and will be dropped and counted.", long, rows, name)
    if templates and result.plain_prompts:
        logger.warning(
            "%d of %d rows of %s have prompts of plain text, and both models have chat templates: neither is used. If "
            "they are questions to an assistant, give --dataset_columns user=prompt,assistant=completion, or messages.",
            result.plain_prompts,
            rows,
            name,
        )


def _tell_empty(empty: int, rows: int, name: str, first: Sequence[str]) -> None:
    logger.warning(
        "%d of %d rows of %s have an empty completion, from which only that the reply ends at once can be learned. "
        "The first: %s.",
        empty,
        rows,
        name,
        ", ".join(f"row {number}" for number in first[:_NAMED]),
    )


def _reasons(bad: Mapping[int, str], name: str) -> str:
    """Each reason once, a line each, with the first row that it is true of and how many others."""
    grouped: dict[str, list[str]] = {}
    for message in bad.values():
        grouped.setdefault(re.sub(rf"^{re.escape(name)} row \d+( of [^ :]+)?", "", message), []).append(message)
    lines = [f"{rows[0]} (and {len(rows) - 1} more)" if len(rows) > 1 else rows[0] for rows in grouped.values()]
    return "\n".join([*lines[:_NAMED], *([f"and {len(lines) - _NAMED} reasons more"] if len(lines) > _NAMED else [])])


# ---- streams -----------------------------------------------------------------------------------------------------


def _usable_stream(data: IterableDataset, read: Read, name: str, on_bad_row: str, replies: bool) -> IterableDataset:
    first = next(iter(data), None)
    if first is None:
        raise DataError(f"{name} has no rows.")
    check_columns(list(first), first, name)
    skip = on_bad_row == "skip"
    if not skip:
        StreamedRows(name, read, skip, replies=False)(first)
    return with_row_numbers(data).filter(StreamedRows(name, read if skip else _as_it_is, skip, replies))


def _as_it_is(sample: Sample) -> bool:
    return True


@dataclass
class StreamedRows:
    """Which rows of a stream can be used. It goes to the data workers with it."""

    name: str
    read: Read
    skip: bool
    replies: bool  # are the rows' own replies trained on?
    seen: int = 0
    empty: int = 0
    first: list[str] = field(default_factory=list)  # numbers of the first of these

    def __call__(self, row: dict[str, Any]) -> bool:
        """Can this row be used? Names one that cannot, and counts those with an empty reply: 1, 10, 100 ... of them."""
        result = survey([row], self.read, self.name)
        if result.bad and not self.skip:
            raise DataError(f"{result.bad[0]} {LEAVE_OUT}")
        if result.bad:
            logger.warning("Left out (on_bad_row): %s", result.bad[0])
        self.seen += 1
        if self.replies and result.empty:
            self.empty += 1
            self.first = [*self.first, *result.empty][:_NAMED]
            if str(self.empty).strip("0") == "1":
                _tell_empty(self.empty, self.seen, self.name, self.first)
        return not result.bad


# ---- kept on disk ------------------------------------------------------------------------------------------------


def _surveyed(data: Any, read: Read, name: str, about: Mapping[str, Any]) -> Survey:
    """The survey of a dataset, from disk if it was made before."""
    rows = data if isinstance(data, Dataset) else [data[i] for i in range(len(data))]
    place = cache_folder("rows")
    code = _code() if place is not None and len(data) >= LEAST else ""
    if place is None or not code:
        return survey(rows, read, name)
    path = place / f"{_digest(rows, {**about, 'name': name, 'code': code})}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        entry = json.loads(path.read_text(encoding="utf-8"))
        return Survey(**{**entry, "bad": {int(i): why for i, why in entry["bad"].items()}})
    result = survey(tqdm(rows, desc=f"Reading {name} on both sides", total=len(data), delay=2), read, name)
    _write(path, asdict(result))
    return result


def _digest(rows: Iterable[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _write(path: Path, values: Mapping[str, Any]) -> None:
    try:
        write_whole(path, json.dumps(values).encode())
    except OSError as error:
        logger.info("What was found about the rows is not kept in %s: %s.", path.parent, error)


@lru_cache
def _code() -> str:
    """Hash of the sources that decide what can be read."""
    root = Path(__file__).parents[1]
    return code_digest(root / package for package in _CODE)
