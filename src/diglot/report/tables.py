"""Numbers before and after a run, side by side."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

Line = tuple[str, float, float, float | None, str]


def before_after_table(lines: Sequence[Line], title: str) -> Table:
    """A table of (name, before, after, noise or None, unit). Noise is what another seed alone would change."""
    table = Table(title=title)
    for name, justify in (("", "left"), ("before", "right"), ("after", "right"), ("noise", "right"), ("unit", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, before, after, noise, unit in lines:
        table.add_row(name, f"{before:.4f}", f"{after:.4f}", "" if noise is None else f"± {noise:.4f}", unit)
    return table
