"""Tables on disk that follow from vocabularies alone: their tries, and the maps from one to another.

Kept are only those that load much faster than they are built. A vocabulary's own table is not among them: a key that
tells two tokenizers apart for sure takes their whole description, and writing that out takes as long as the table.

Where: `DIGLOT_TABLES`, by default `tables` in `DIGLOT_CACHE` (by default `~/.cache/diglot`); either may say `off`. The
folder may be deleted at any time. What is not there, or cannot be read or written, is built, never an error.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from diglot.arrays import Ints
from diglot.disk import cache_folder, code_digest, write_whole

Record = dict[str, Any]

logger = logging.getLogger(__name__)

LEAST = 1 << 18  # bytes of the largest table; below that, building takes a few hundredths of a second
LARGEST = 1 << 30  # bytes of an entry; those of 262,144 pieces take a hundredth of it
_INT32 = np.iinfo(np.int32)


class Table(Protocol):
    """What a `Vocabulary` holds of its tokens: their bytes one after the other, and where each one's lie."""

    @property
    def data(self) -> NDArray[np.uint8]: ...  # [D]
    @property
    def offsets(self) -> Ints: ...  # [V + 1]
    @property
    def lengths(self) -> Ints: ...  # [V]
    @property
    def content_hash(self) -> str: ...
    def tokens(self) -> Sequence[bytes]: ...
    def __len__(self) -> int: ...


def cached(kind: str, vocabularies: Sequence[Table], build: Callable[[], Mapping[str, Ints]]) -> Mapping[str, Ints]:
    """What `build` gives for these vocabularies, from disk if it was built before.

    `build` must be a function of the byte tables, names and sizes of the vocabularies alone, and live in this package:
    entries of other vocabularies, or made by other code, are never read.
    """
    place = folder()
    if place is None or max(len(v.data) for v in vocabularies) < LEAST or not (code := _code()):
        return build()
    about = {"kind": kind, "of": [[v.content_hash, len(v)] for v in vocabularies]}
    path = place / f"{kind}-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]}.safetensors"
    about["code"] = code
    if (stored := _read(path, about)) is not None:
        return stored
    built = build()
    _write(path, built, about)
    return built


def folder() -> Path | None:
    """Where tables are kept; None where they are not."""
    return cache_folder("tables", "DIGLOT_TABLES")


def _read(path: Path, about: Record) -> dict[str, Ints] | None:
    """The arrays of an entry, or None if there is none, or if it is not whole and about just this."""
    try:
        if path.stat().st_size > LARGEST:
            return None
        raw = path.read_bytes()
    except OSError:
        return None
    try:
        stored = safetensors.numpy.load(raw)
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        record = json.loads(header["__metadata__"]["diglot"])
        differing = _differing(record, {**about, "sha256": _digest(stored)})
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        differing = [repr(error)]
    if differing:
        _say(path, tuple(differing))
        return None
    return {name: array.astype(np.int64) for name, array in stored.items()}


def _differing(record: Record, expected: Record) -> list[str]:
    """What the record says of an entry that it should not."""
    keys = [key for key in sorted({*record, *expected}) if record.get(key) != expected.get(key)]
    return [f"{key} is {record.get(key)!r}, expected {expected.get(key)!r}" for key in keys]


@lru_cache
def _say(path: Path, differing: tuple[str, ...]) -> None:
    outdated = len(differing) == 1 and differing[0].startswith("code is")  # nothing to worry about
    level = logging.INFO if outdated else logging.WARNING
    logger.log(level, "%s is not used, and built anew: %s.", path, "; ".join(differing))


def _write(path: Path, arrays: Mapping[str, Ints], about: Record) -> None:
    """Put an entry in its place."""
    stored = {name: _narrow(array) for name, array in arrays.items()}
    record = json.dumps({**about, "sha256": _digest(stored)})
    try:
        write_whole(path, safetensors.numpy.save(stored, {"diglot": record}))
    except OSError as error:
        _say_unwritable(path.parent, str(error))


@lru_cache
def _say_unwritable(place: Path, error: str) -> None:
    logger.info("No tables are kept in %s: %s.", place, error)


def _narrow(array: Ints) -> NDArray[Any]:
    """Half as large where the values allow it."""
    fits = array.min(initial=0) >= _INT32.min and array.max(initial=0) <= _INT32.max
    return np.ascontiguousarray(array, dtype=np.int32 if fits else np.int64)


def _digest(stored: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(stored.items()):
        digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


@lru_cache
def _code() -> str:
    """Hash of the sources that build the tables."""
    return code_digest([Path(__file__).parent])
