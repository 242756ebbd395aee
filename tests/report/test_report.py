"""Tables show what they are given, as it is."""

from __future__ import annotations

import io

from rich.console import Console

from diglot.report import CompletionRow, before_after_table, print_completions


def printed(thing: object) -> str:
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(thing)
    return console.export_text()


def test_completions_are_text_not_markup() -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    print_completions([CompletionRow("a [bold]b[/]", "c [red]d", 0.25)], step=7, console=console)
    text = console.export_text()
    assert "a [bold]b[/]" in text and "c [red]d" in text and "+0.250" in text and "step 7" in text


def test_before_and_after_stand_in_one_line_with_their_noise() -> None:
    text = printed(
        before_after_table([("divergence", 0.5, 0.25, 0.01, "nats"), ("coverage", 1.0, 1.0, None, "share")], "T")
    )
    line = next(one for one in text.splitlines() if "divergence" in one)
    assert "0.5000" in line and "0.2500" in line and "± 0.0100" in line and "nats" in line
