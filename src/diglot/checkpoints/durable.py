"""Folders that are whole or not there: written beside their place, flushed to the disk, and renamed.

A folder is whole if it holds a manifest, which is written last and lists every file with its size and SHA-256.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from diglot.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
BESIDE = ".saving-"  # a folder that is being written
GONE = ".removing-"  # a folder that is being removed
_LARGEST_MANIFEST = 1 << 24  # bytes
_AT_A_TIME = 8  # files; a thread reads one, and hashing it lets the others run


@contextlib.contextmanager
def writing(beside: Path) -> Iterator[None]:
    """Make a folder to write into, and hold it: nobody's `tidy` clears it away meanwhile.

    Raises:
        CheckpointError: another process writes into it.
    """
    beside.mkdir(parents=True, exist_ok=True)
    handle = _hold(beside)
    if handle is None:
        raise CheckpointError(f"Another process is saving into {beside.parent}. Give each run its own output_dir.")
    try:
        yield
    finally:
        os.close(handle)


def _hold(beside: Path) -> int | None:
    """A handle that holds a folder until it is closed or its process ends; None if somebody else holds it."""
    handle = os.open(beside, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:  # a file system that has no locks
        pass
    return handle


def seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Flush every file of `folder` to the disk, then write its manifest: `about`, and what the files are."""
    files = {str(p.relative_to(folder).as_posix()): p for p in sorted(folder.rglob("*")) if p.is_file()}
    files.pop(MANIFEST, None)
    with ThreadPoolExecutor(_AT_A_TIME) as threads:
        listed = dict(zip(files, threads.map(_sealed, files.values()), strict=True))
    for below in {p.parent for p in files.values()}:
        _flush(below)
    text = json.dumps({"format": FORMAT, **about, "files": listed}, indent=1, ensure_ascii=False, sort_keys=True)
    unfinished = folder / f"{MANIFEST}.part"
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.rename(unfinished, folder / MANIFEST)
    _flush(folder)


def place(made: Path, target: Path) -> None:
    """Rename a sealed folder to `target`, in place of what is there. After a kill between the two `tidy` does it."""
    if target.exists():
        remove(target)
    os.rename(made, target)
    _flush(target.parent)


def remove(folder: Path) -> None:
    """Remove a folder so that no part of it is ever found under its name."""
    doomed = folder.with_name(f"{GONE}{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def tidy(run: Path) -> None:
    """Clear away what a save that failed or was killed left in `run`, not what a process is writing.

    A folder that was whole but not yet in its place is put there.
    """
    if not run.is_dir():
        return
    for beside in run.glob(f"{BESIDE}*"):
        with contextlib.suppress(FileNotFoundError):  # it has come to its end meanwhile
            if (handle := _hold(beside)) is None:
                continue
            try:
                for made in beside.iterdir() if beside.is_dir() else ():
                    if not (run / made.name).exists() and problem(made) is None:
                        os.rename(made, run / made.name)
                shutil.rmtree(beside, ignore_errors=True)
            finally:
                os.close(handle)
    for doomed in run.glob(f"{GONE}*"):
        shutil.rmtree(doomed, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a whole folder; every file is there and as long as it says.

    Raises:
        CheckpointError: no manifest, one that cannot be read, or files that are missing or of another size.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"There is no checkpoint {folder}. Check the path of resume_from_checkpoint.")
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST_MANIFEST + 1)
        if len(text) > _LARGEST_MANIFEST:
            raise ValueError(f"it is larger than {_LARGEST_MANIFEST} bytes")
        manifest: dict[str, Any] = json.loads(text)
        files = manifest["files"]
        sizes = {str(name): int(entry["size"]) for name, entry in files.items()}
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} is not a complete checkpoint: it has no {MANIFEST}, which is written last. It was interrupted, "
            "or is not one of Diglot's. Resume from another one, or give the folder as model_name_or_path to start "
            "from its weights."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Resume from another checkpoint.") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest.get('format')!r}, expected {FORMAT}. Use the Diglot it is of."
        )
    for name, size in sizes.items():
        inside = folder / name
        if Path(name).is_absolute() or not inside.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{path} names {name!r}, which is outside of its folder. Do not use this checkpoint.")
        seen = inside.stat().st_size if inside.is_file() else None
        if seen != size:
            raise CheckpointError(
                f"{folder} is not a complete checkpoint: {name} has {'no file' if seen is None else f'{seen} bytes'}, "
                f"expected {size} bytes. Resume from another one."
            )
    return manifest


def verify(folder: Path) -> dict[str, Any]:
    """`read_manifest`, and every file has the content that it had when it was written."""
    manifest = read_manifest(folder)
    with ThreadPoolExecutor(_AT_A_TIME) as threads:
        digests = list(threads.map(sha256, (folder / name for name in manifest["files"])))
    for (name, entry), seen in zip(manifest["files"].items(), digests, strict=True):
        if seen != entry.get("sha256"):
            raise CheckpointError(
                f"{folder / name} is damaged: its SHA-256 is {seen}, expected {entry.get('sha256')}. Resume from "
                "another checkpoint."
            )
    return manifest


def problem(folder: Path) -> str | None:
    """Why a folder is not whole, by names and sizes; None if it is."""
    try:
        read_manifest(folder)
    except CheckpointError as error:
        return str(error)
    return None


def sha256(path: Path) -> str:
    """Of a file's content, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sealed(path: Path) -> dict[str, Any]:
    """Size and digest of a file that the disk then holds."""
    entry = {"size": path.stat().st_size, "sha256": sha256(path)}
    _flush(path)
    return entry


def _flush(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def age(folder: Path) -> int:
    """When a folder was sealed, nanoseconds."""
    return (folder / MANIFEST).stat().st_mtime_ns


def move_files(made: Path, target: Path, last: tuple[str, ...]) -> None:
    """Move the files of `made` into `target`, which does not load meanwhile: the files named `last` come last."""
    for path in made.rglob("*"):
        if path.is_file():
            _flush(path)
    for name in last:
        (target / name).unlink(missing_ok=True)
    for path in sorted(made.iterdir(), key=lambda p: p.name in last):
        there = target / path.name
        if there.is_dir():
            shutil.rmtree(there)
        os.replace(path, there)
    _flush(target)
    shutil.rmtree(made, ignore_errors=True)
