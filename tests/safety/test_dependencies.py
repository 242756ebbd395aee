"""What is installed for tests and demo is one known version each; `make audit` asks whether any has known faults."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support import audit
from support.lowest import lowest

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


def test_the_lowest_declared_versions_are_what_ci_installs() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    constraints = lowest(text)
    declared = re.findall(r'^    "([\w-]+)>=', text.split("[project.optional-dependencies]")[0], re.M)
    assert [line.split("==")[0] for line in constraints] == [*declared, "peft"]
    assert f'"{constraints[0].replace("==", ">=")}"' in text and len(declared) > 5
    assert "make lowest" in (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")


CLEAN = {"name": "a", "version": "1", "vulns": []}
FAULTY = {"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"], "description": ""}]}
UNKNOWN = {"name": "c", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("packages", "code", "message"),
    [
        ([CLEAN, CLEAN], 0, "2 of 2 packages asked about, 0 known faults"),
        ([CLEAN, FAULTY], 1, "b 2: PYSEC-1, fixed in 3"),
        ([CLEAN, UNKNOWN], 1, "c: not found"),
        ([FAULTY, UNKNOWN], 1, "1 of 2 packages asked about, 1 known faults"),
        ([UNKNOWN, UNKNOWN], audit.NOT_REACHED, "NOT AUDITED"),
    ],
)
def test_the_audit_never_calls_clean_what_it_could_not_ask(packages: list[Any], code: int, message: str) -> None:
    result, lines = audit.verdict(packages)
    assert result == code and any(message in line for line in lines)
