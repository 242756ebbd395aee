"""Tables show what they are given, as it is."""

from __future__ import annotations

import io

from rich.console import Console

from diglot.report import CompletionRow, print_completions


def test_completions_are_text_not_markup() -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    print_completions([CompletionRow("a [bold]b[/]", "c [red]d", 0.25)], step=7, console=console)
    text = console.export_text()
    assert "a [bold]b[/]" in text and "c [red]d" in text and "+0.250" in text and "step 7" in text
