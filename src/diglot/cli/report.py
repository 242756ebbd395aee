"""`diglot report`: one HTML file about a run, or about two."""

from __future__ import annotations

import webbrowser
from collections.abc import Sequence
from pathlib import Path

from diglot.cli.parsing import Parser
from diglot.report.page import page
from diglot.report.runs import load_run


def parser() -> Parser:
    """The parser of the command."""
    parser = Parser(
        prog="diglot report",
        description="Show what a run did, or what two did: one HTML file that opens offline.",
        epilog="example:\n  diglot report runs/first --open",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the output_dir of a run")
    parser.add_argument("other", type=Path, nargs="?", metavar="RUN_B", help="another one to compare it with")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write (default: RUN/report.html)")
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    return parser


def report(arguments: Sequence[str]) -> int:
    """Write the page and say where it is."""
    options = parser().parse_args(arguments)
    runs = [load_run(folder) for folder in (options.run, options.other) if folder is not None]
    out = options.out or options.run / ("report.html" if options.other is None else f"report-{runs[1].name}.html")
    text = page(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(out)
    if options.open:
        webbrowser.open(out.resolve().as_uri())
    return 0
