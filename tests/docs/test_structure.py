"""The house keeps its order: a room imports from the rooms above it, and no file or function grows out of hand."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = re.findall(r"^  (\w+)  ", (ROOT / "docs" / "design.md").read_text(encoding="utf-8"), re.M)
SOURCES = sorted((ROOT / "src" / "diglot").rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT / "src" / "diglot").parts[0].removesuffix(".py")


def test_no_room_imports_from_a_room_below_it() -> None:
    """The order is the list in docs/design.md."""
    assert set(ROOMS) == {room(p) for p in SOURCES} - {"__init__", "__main__"}
    for path in SOURCES:
        if room(path) in ROOMS:
            for other in re.findall(r"from diglot\.(\w+)", path.read_text(encoding="utf-8")):
                assert ROOMS.index(other) <= ROOMS.index(room(path)), (path.name, other)


def test_files_and_functions_stay_readable() -> None:
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 600, path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert (node.end_lineno or 0) - node.lineno <= 120, (path.name, node.name)
