"""Sampled completions as a table in the terminal, each chunk shaded by how much more the teacher likes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from diglot.report.colours import background


@dataclass(frozen=True)
class CompletionRow:
    """One prompt and what was written to it. `gap` is log p_teacher - log p_student in nats per byte, if known.

    `chunks` are the completion's parts with their own gap in nats, None where the sides cannot be compared.
    """

    prompt: str
    completion: str
    gap: float | None = None
    chunks: Sequence[tuple[str, float | None]] = ()

    def shaded(self) -> Text:
        """The completion; blue is what the teacher likes more than the student, orange what it likes less."""
        if not self.chunks:
            return Text(self.completion)
        text = Text()
        for part, gap in self.chunks:
            colour = background(gap)
            text.append(part, style=f"white on {colour}" if colour else "")
        return text


def print_completions(rows: Sequence[CompletionRow], step: int, console: Console | None = None) -> None:
    """Print `rows` under the title of optimizer step `step`. Text is shown as it is, never read as markup."""
    shaded = any(row.chunks for row in rows)
    caption = "blue: the teacher likes it more than the student, orange: less" if shaded else None
    table = Table(title=f"Completions, step {step}", caption=caption, show_lines=True, expand=True)
    table.add_column("prompt", style="cyan", ratio=2, overflow="fold")
    table.add_column("completion", ratio=3, overflow="fold")
    table.add_column("teacher - student\nnats per byte", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(Text(row.prompt), row.shaded(), "" if row.gap is None else f"{row.gap:+.3f}")
    (console or Console()).print(table)
