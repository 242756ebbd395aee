"""`diglot report`: one HTML file about a run, or about two."""

from __future__ import annotations

import argparse
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from diglot.report.page import page
from diglot.report.runs import load_run


def report(arguments: Sequence[str]) -> int:
    """Write the page and say where it is."""
    parser = argparse.ArgumentParser(
        prog="diglot report",
        description="Show what a run did, or what two did: one HTML file that opens offline.",
        epilog="example: diglot report runs/first --open",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the output_dir of a run")
    parser.add_argument("other", type=Path, nargs="?", metavar="RUN_B", help="another one to compare it with")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write (default: RUN/report.html)")
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    given = parser.parse_args(arguments)
    runs = [load_run(folder) for folder in (given.run, given.other) if folder is not None]
    out = given.out or given.run / ("report.html" if given.other is None else f"report-{runs[1].name}.html")
    text = page(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(out)
    if given.open:
        webbrowser.open(out.resolve().as_uri())
    return 0
