"""In a notebook the table has the numbers that matter, with their units, as the line of a terminal has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
from datasets import Dataset
from support import tiny
from transformers import trainer as transformers_trainer


class Shown:
    """Keeps the last HTML of each display."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers.utils import notebook

        self.html: list[str] = []
        shown = self

        class Handle:
            def update(self, text: str) -> None:
                shown.html[-1] = text

        def display(text: str, display_id: bool = False) -> Handle:
            self.html.append(text)
            return Handle()

        monkeypatch.setattr(notebook.disp, "display", display)
        monkeypatch.setattr(notebook.disp, "HTML", str)

    @property
    def columns(self) -> list[str]:
        head = self.html[-1].split("<thead>")[1].split("</thead>")[0]
        return [part.split("</th>")[0].strip() for part in head.split("<th>")[1:]]

    @property
    def rows(self) -> list[list[str]]:
        body = self.html[-1].split("<tbody>")[1].split("</tbody>")[0]
        return [[cell.split("</td>")[0] for cell in row.split("<td>")[1:]] for row in body.split("<tr>")[1:]]


def in_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    from transformers.utils.notebook import NotebookProgressCallback

    monkeypatch.setattr(transformers_trainer, "DEFAULT_PROGRESS_CALLBACK", NotebookProgressCallback)
    return tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), disable_tqdm=False, lmbda=1.0, **options)


def test_training_shows_nats_per_byte_and_coverage_beside_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = Shown(monkeypatch)
    in_notebook(tmp_path, monkeypatch, log_rollouts=1).train()
    assert shown.columns[:3] == ["Step", "loss", "nats/byte"] and "coverage" in shown.columns
    assert len(shown.rows) == 2 and all(len(row) == len(shown.columns) for row in shown.rows)
    assert "%" in shown.rows[0][shown.columns.index("coverage")]


def test_an_evaluation_says_its_units_within_training_and_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = Shown(monkeypatch)
    data = Dataset.from_list(tiny.CHAT_ROWS[:4])
    trainer = in_notebook(tmp_path, monkeypatch, eval_strategy="steps", eval_steps=1, keywords=dict(eval_dataset=data))
    trainer.train()
    assert {"loss", "eval nats/byte", "eval bits/byte", "eval coverage"} <= set(shown.columns)
    assert len(shown.rows) == 2 and all(shown.rows[-1])
    trainer.evaluate()
    assert set(shown.columns) == {"Step", "eval nats/byte", "eval coverage", "eval stop", "eval bits/byte"}
