"""`diglot objectives`: the decision table, one block per objective."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from diglot.cli.parsing import Parser
from diglot.cli.screen import show_phases
from diglot.phases import LOADING, phase

EXAMPLE = """example:
  diglot objectives --markdown
"""


def parser() -> Parser:
    """The parser of the command."""
    parser = Parser(prog="diglot objectives", description="Which objective for what.", epilog=EXAMPLE)
    parser.add_argument("--markdown", action="store_true", help="the table as markdown")
    return parser


def show(arguments: Sequence[str]) -> int:
    """Print the table for the terminal, or as markdown."""
    options = parser().parse_args(arguments)
    show_phases()
    with phase(LOADING):
        from diglot.objectives import guide

    if options.markdown:
        print(guide.markdown(), end="")
        return 0
    table = Table(title="Objectives: --objective NAME, or a weighted list in a recipe", show_lines=True)
    table.add_column("objective", no_wrap=True, style="bold")
    table.add_column("which")
    for name, needs, about in guide.table():
        lines = (f"needs {needs}", f"sees {about.sees}", f"zero when {about.zero}", f"cost of a row: {about.cost}")
        table.add_row(name, "\n".join([about.use, *(f"[dim]{line}[/dim]" for line in lines)]))
    Console().print(table)
    return 0
