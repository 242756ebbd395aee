"""Sampled completions as a table in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class CompletionRow:
    """One prompt and what was written to it. `gap` is log p_teacher - log p_student in nats per byte, if known."""

    prompt: str
    completion: str
    gap: float | None = None


def print_completions(rows: Sequence[CompletionRow], step: int, console: Console | None = None) -> None:
    """Print `rows` under the title of optimizer step `step`. Text is shown as it is, never read as markup."""
    table = Table(title=f"Completions, step {step}", show_lines=True, expand=True)
    table.add_column("prompt", style="cyan", ratio=2, overflow="fold")
    table.add_column("completion", ratio=3, overflow="fold")
    table.add_column("teacher - student\nnats per byte", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(Text(row.prompt), Text(row.completion), "" if row.gap is None else f"{row.gap:+.3f}")
    (console or Console()).print(table)
