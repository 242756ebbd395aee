"""What goes to disk: files that are kept between runs, written whole or not at all, and values for JSON."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


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


def finite(value: Any) -> Any:
    """Plain values for JSON, which has no number that is not finite: None in its place."""
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
