"""Files that are kept between runs: in which folder, by which code, and written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path


def cache_folder(name: str, variable: str = "") -> Path | None:
    """The folder `name` in `DIGLOT_CACHE` (default `~/.cache/diglot`), unless an environment variable names another.

    None where one of both is `off`, or nobody has a home.
    """
    root = os.environ.get("DIGLOT_CACHE") or "~/.cache/diglot"
    place = os.environ.get(variable) or (root if root == "off" else os.path.join(root, name))
    if place == "off":
        return None
    with contextlib.suppress(RuntimeError):  # nobody's home
        return Path(place).expanduser()
    return None


def code_digest(packages: Iterable[Path]) -> str:
    """Hash of the sources in these folders, so that a change of them needs no one to count versions up.

    Empty where there are no sources to read.
    """
    try:
        sources = [path.read_bytes() for package in packages for path in sorted(package.glob("*.py"))]
    except OSError:
        return ""
    return hashlib.sha256(b"\0".join(sources)).hexdigest() if sources else ""


def write_whole(path: Path, content: bytes) -> None:
    """Put a file in its place whole, or not at all, whoever else reads or writes it meanwhile. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(prefix=path.stem, suffix=".part", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(content)
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise
