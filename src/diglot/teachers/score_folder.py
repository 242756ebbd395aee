"""The folder of `diglot score`: what a teacher said about fixed texts, in shards that are read from memory maps.

    request.json               what was asked: teacher, tokenizer, template, texts, level; written first
    tokenizer/                 the teacher's tokenizer
    shard-00000.safetensors    the answers about some texts, written under another name and then renamed
    scores.json                the index; written last, so a folder without it is unfinished

Shapes in a shard: `M` texts, `T` scored tokens, `G` segments, `L` bytes and stops of all segments.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from diglot.arrays import Ints
from diglot.batches import PackedSide
from diglot.errors import TeacherError

FORMAT = 2
REQUEST, INDEX = "request.json", "scores.json"
LEVELS = ("logprobs", "top_k", "bytes")
PER_TOKEN = ("logps", "written", "top_ids", "top_logps")


@dataclass(frozen=True)
class Answer:
    """What a teacher said about one text: all in nats, of `n` scored tokens."""

    logps: NDArray[np.float32]  # [n] of each written token; for stop, of the whole stop set
    written: NDArray[np.float32]  # [n] of each written token
    top_ids: NDArray[np.int32]  # [n, k] likeliest first, k may be 0
    top_logps: NDArray[np.float32]  # [n, k]; what is left to 1 is the residual mass
    distributions: NDArray[np.float16]  # [l, 257] next-byte distributions of all segments; NaN where there is none
    distribution_counts: Ints  # [g] how many of them each segment has


def text_keys(side: PackedSide) -> list[bytes]:
    """For each row of a batch a digest of the ids that are read and of which of them are scored."""
    ids, mask, at = side.input_ids.cpu().numpy(), side.attention_mask.cpu().numpy(), side.rows.cpu().numpy()
    width = ids.shape[1]
    row, place = np.divmod(at, width)
    digests = []
    for b in range(len(ids)):
        read = ids[b][mask[b] > 0].astype(np.int64)
        text = f"{len(read)}/".encode() + read.tobytes() + place[row == b].astype(np.int64).tobytes()
        digests.append(hashlib.sha256(text).digest())
    return digests


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file so that it is there as a whole or not at all."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def write_shard(path: Path, keys: Sequence[bytes], answers: Sequence[Answer]) -> None:
    """The answers about some texts. The same answers make the same bytes."""
    columns = {
        name: _joined([getattr(a, name) for a in answers])
        for name in (*PER_TOKEN, "distributions", "distribution_counts")
    }
    counts = {
        "token_offset": [len(a.logps) for a in answers],
        "distribution_offset": [len(a.distributions) for a in answers],
        "segment_offset": [len(a.distribution_counts) for a in answers],
    }
    offsets = {name: np.cumsum([0, *lengths], dtype=np.int64) for name, lengths in counts.items()}
    digests = {
        "key": np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 32),
        "check": np.frombuffer(b"".join(map(_checksum, answers)), dtype=np.uint8).reshape(-1, 8),
    }
    unfinished = path.with_suffix(".tmp")
    save_file({name: np.ascontiguousarray(x) for name, x in {**columns, **offsets, **digests}.items()}, unfinished)
    os.replace(unfinished, path)


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(parts)


def _checksum(answer: Answer) -> bytes:
    digest = hashlib.sha256()
    for name in (*PER_TOKEN, "distributions", "distribution_counts"):
        digest.update(np.ascontiguousarray(getattr(answer, name)).tobytes())
    return digest.digest()[:8]


class Shard:
    """One file of answers, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="numpy")
            self.keys = [row.tobytes() for row in self._file.get_tensor("key")]
            self._offsets = {
                name: self._file.get_tensor(f"{name}_offset") for name in ("token", "distribution", "segment")
            }
            self._checks = self._file.get_tensor("check")
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise TeacherError(f"{path} cannot be read: {error}. Remove it and run `diglot score` again.") from error

    @property
    def text_bytes(self) -> int:
        """Bytes and stops that have a row for a next-byte distribution."""
        return int(self._offsets["distribution"][-1])

    @property
    def tokens(self) -> int:
        """Scored tokens of all its texts."""
        return int(self._offsets["token"][-1])

    def read(self, i: int) -> Answer:
        """The answer about its text `i`. `TeacherError` if it is not what was written."""
        parts = {name: self._slice(name, "token", i) for name in PER_TOKEN}
        answer = Answer(
            **parts,
            distributions=self._slice("distributions", "distribution", i),
            distribution_counts=self._slice("distribution_counts", "segment", i),
        )
        if _checksum(answer) != self._checks[i].tobytes():
            raise TeacherError(f"{self.path} is damaged at text {i}. Remove it and run `diglot score` again.")
        return answer

    def _slice(self, name: str, unit: str, i: int) -> NDArray[Any]:
        low, high = self._offsets[unit][i : i + 2]
        column = self._file.get_slice(name)
        empty = 0 in column.get_shape()
        values: NDArray[Any] = self._file.get_tensor(name) if empty else column[int(low) : int(high)]
        return values


@dataclass(frozen=True)
class Folder:
    """A finished folder of scores."""

    path: Path
    request: Mapping[str, Any]
    index: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> Folder:
        """Read request and index. `TeacherError` for an unfinished folder, another format, or missing shards."""
        if not (path / INDEX).exists():
            raise TeacherError(
                f"{path} holds scores that are not finished: there is no {INDEX}. Run `diglot score` with the same "
                "options again; it goes on where it was."
            )
        request, index = (json.loads((path / name).read_text(encoding="utf-8")) for name in (REQUEST, INDEX))
        if index.get("format") != FORMAT:
            raise TeacherError(
                f"{path} is of format {index.get('format')}, this version reads {FORMAT}. Score the texts again."
            )
        for shard in index["shards"]:
            size = (path / shard["file"]).stat().st_size if (path / shard["file"]).exists() else None
            if size != shard["bytes"]:
                raise TeacherError(
                    f"{path / shard['file']} has {size} bytes, the index says {shard['bytes']}. Remove it and {INDEX}, "
                    "and run `diglot score` again."
                )
        return cls(path, request, index)

    def shards(self) -> Iterator[Shard]:
        """Its files, in order."""
        for shard in self.index["shards"]:
            yield Shard(self.path / shard["file"])


def is_scores(name: Any) -> bool:
    """Is this the name of a folder that `diglot score` made, finished or not?"""
    if not isinstance(name, (str, Path)):
        return False
    path = Path(name).expanduser()
    return (path / INDEX).exists() or (path / REQUEST).exists()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What two requests differ in, in words, with both values."""
    messages = []
    for name in sorted(old.keys() | new.keys()):
        mine, theirs = old.get(name), new.get(name)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            messages += [f"{name} {one}" for one in differences(mine, theirs)]
        elif mine != theirs:
            messages.append(f"{name}: {mine!r} there, {theirs!r} here")
    return messages
