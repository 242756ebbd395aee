"""The messages on the troubleshooting page are messages of the program."""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^\| `(.+?)` \| (.+) \|$", PAGE, re.M)
VALUE = "…"


@lru_cache
def texts_of_the_sources() -> list[str]:
    """Every string of the program, with `…` where a value is put in, without backticks."""
    results = []
    for path in (ROOT / "src" / "diglot").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                results.append("".join(str(v.value) if isinstance(v, ast.Constant) else VALUE for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                results.append(node.value)
    return [text.replace("`", "") for text in results]


def is_said(message: str) -> bool:
    return any(message in text for text in texts_of_the_sources())


@pytest.mark.parametrize("message", [message for message, _ in MESSAGES])
def test_the_message_is_said_by_the_program(message: str) -> None:
    assert len(message.replace(VALUE, "").strip()) >= 8, "too short to be found by"
    assert is_said(message)


def test_a_message_that_nobody_says_is_found_out() -> None:
    assert is_said("There is no teacher.") and not is_said("There is no teacher at all.")
    assert len(MESSAGES) >= 30
    assert len(MESSAGES) == len(re.findall(r"^\| `", PAGE, re.M)), "a row that the tests do not read"


def test_every_kind_of_error_is_on_the_page() -> None:
    """Each class of `diglot.errors` is raised with at least one of the messages."""
    raised = {}
    for path in (ROOT / "src" / "diglot").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("Error"):
                raised.setdefault(node.func.id, []).append(ast.unparse(node).replace("`", ""))
    for kind in ("VocabularyError", "RenderingError", "AlignmentError", "TeacherError", "ConfigError", "DataError"):
        pieces = [max(message.split(VALUE), key=len).strip() for message, _ in MESSAGES]
        assert any(piece in call for piece in pieces for call in raised[kind]), kind
