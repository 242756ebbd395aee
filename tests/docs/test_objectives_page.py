"""The page on objectives says what the program and the oracle say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.oracle_gaps import gap_table, markdown
from support.scored import pair

from diglot.cli.main import main
from diglot.objectives import OBJECTIVES, guide, make_objective

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")


def test_the_decision_table_has_every_objective_and_is_the_one_in_the_documentation() -> None:
    assert guide.GUIDE.keys() == OBJECTIVES.keys()
    assert guide.markdown() in PAGE


def test_the_terminal_shows_every_objective(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["objectives"]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"\b{name}\b", shown) for name in OBJECTIVES)
    assert main(["objectives", "--markdown"]) == 0
    assert capsys.readouterr().out == guide.markdown()


def test_the_oracle_table_of_the_documentation_is_what_the_oracle_measures() -> None:
    documented, measured = (
        {(name, claim, unit, gap.startswith("exact")): gap for name, claim, gap, unit in rows}
        for rows in (_rows(PAGE), _rows(markdown(gap_table())))
    )
    for key, gap in measured.items():
        assert _numbers(documented[key]) == pytest.approx(_numbers(gap), rel=0.06), key
    assert len(documented) >= len(measured) > 30


def _rows(text: str) -> list[list[str]]:
    return [cells for cells in map(_cells, text.splitlines()) if len(cells) == 4 and cells[0].startswith("`")]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def _numbers(gap: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d[\d.]*(?:e-?\d+)?", gap)]


@pytest.mark.parametrize("page", ["docs/objectives.md", "README.md"])
def test_lists_of_objectives_in_the_documentation_can_be_made(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    results = [line for block in re.findall(r"```yaml\n(.*?)```", text, re.S) for line in _entries(block)]
    assert results
    for entry in results:
        options = {k: v for k, v in entry.items() if k not in ("name", "weight")}
        assert make_objective(entry["name"], pair("chatml", "turns"), **options).name == entry["name"]


def _entries(block: str) -> list[dict[str, Any]]:
    return [yaml.safe_load(line) for line in re.findall(r"\{.*\}", block)]
