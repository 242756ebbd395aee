"""What is installed for tests and demo is one known version each; `make audit` asks whether any has known faults."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINES = [
    line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"
]


def test_every_constraint_is_one_version() -> None:
    assert len(LINES) > 20
    assert [line for line in LINES if not re.match(r"^[A-Za-z0-9._-]+==[\w.+!-]+(\s*;.*)?$", line)] == []


def test_every_direct_dependency_is_pinned() -> None:
    """But torch: which of its builds is wanted is decided by who installs it."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    names = set(re.findall(r'"([A-Za-z][\w-]*)(?:\[[\w,-]+\])?[><=]=[^"]*"', text.split("[project.scripts]")[0]))
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in LINES}
    assert {"transformers", "safetensors", "pytest", "ruff"} <= names
    assert {name.lower() for name in names} - pinned <= {"torch", "setuptools"}


def test_the_audit_fails_where_it_cannot_ask() -> None:
    assert re.search(
        r"^audit:.*\n(?:\t.*\n)*\t.*pip-audit --strict", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M
    )
