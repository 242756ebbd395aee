"""Every promise of docs/promises.md names tests that are in the tree, are collected, and run in the tier it says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\d+) \| (.*) \| (.*) \|$", PAGE, re.M)
LINK = re.compile(r"`([\w/]+\.py)::(test_\w+)`(?: \((\w+)\))?")


def test_the_promises_are_numbered_and_each_has_tests() -> None:
    assert [int(number) for number, _, _ in ROWS] == list(range(1, 14))
    assert all(LINK.findall(tests) for _, _, tests in ROWS)


@pytest.mark.parametrize(("file", "test", "tier"), [link for _, _, tests in ROWS for link in LINK.findall(tests)])
def test_the_test_of_a_promise_is_collected_in_its_tier(file: str, test: str, tier: str) -> None:
    """By the rules of collection: a function at the top of a test file, not skipped, with the mark that is said."""
    path = ROOT / "tests" / file
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert path.name.startswith("test_")
    (result,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == test)
    marks = set(_marks(result.decorator_list))
    for node in tree.body:
        if isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node.targets[0]):
            marks |= set(_marks([node.value]))
    assert not marks & {"skip", "skipif", "xfail"}
    assert marks & {"real", "nightly"} == ({tier} if tier else set())


def _marks(nodes: list[ast.expr]) -> list[str]:
    return [name for node in nodes for name in re.findall(r"pytest\.mark\.(\w+)", ast.unparse(node))]
