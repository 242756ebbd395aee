"""The notebook runs from its first cell to its last, on tiny models."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
import support.tokenizers_zoo as zoo
from support import tiny

PAGE = Path(__file__).resolve().parents[2] / "docs" / "notebook.ipynb"


def tagged(book: nbformat.NotebookNode, tag: str) -> nbformat.NotebookNode:
    (results,) = [cell for cell in book.cells if tag in cell.metadata.get("tags", ())]
    return results


def test_the_notebook_runs_and_ends_with_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, tokenizer in (("student", zoo.chatml()), ("teacher", zoo.inst())):
        tiny.tiny_model(tokenizer).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    book = nbformat.read(PAGE, as_version=4)
    tagged(book, "install").source = "pass"  # it is installed
    tagged(book, "parameters").source = "STUDENT, TEACHER = 'student', 'teacher'\nSTEPS, BATCH, LENGTH = 2, 2, 8"
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    client = nbclient.NotebookClient(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    shown = [
        str(output.get("text") or output.get("data", {}).get("text/html", "")) for cell in book.cells
        for output in cell.get("outputs", ())
    ]  # fmt: skip
    for expected in ("Verdict", "together", "chunks", "nats/byte", "<iframe"):
        assert any(expected in text for text in shown), expected
    assert (tmp_path / "runs" / "notebook" / "report.html").exists()
    assert not any("Traceback" in text for text in shown)


def test_the_notebook_is_kept_without_outputs_and_opens_in_colab() -> None:
    book = nbformat.read(PAGE, as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in book.cells)
    assert f"blob/main/docs/{PAGE.name}" in book.cells[0].source
