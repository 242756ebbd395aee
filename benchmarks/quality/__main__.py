"""The command line: `python -m benchmarks.quality run ci`."""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from . import __doc__ as about
from .declaration import Declaration, DeclarationError, load
from .runner import PairResult, Plan, progress, quiet, run_all


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or show a tier; 1 if a cell failed or a pair was refused, 2 for a declaration that cannot be run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "table"], help="run what is missing, or only show what there is")
    parser.add_argument("declaration", help="ci, exact, cpu, gpu, smoke, or a YAML file")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="results are in a folder of the name")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the arms, one thread each")
    parser.add_argument("--pairs", nargs="+", help="only these")
    parser.add_argument("--arms", nargs="+", help="only these")
    parser.add_argument("--any-code", action="store_true", help="take cells that other code has run")
    options = parser.parse_args(arguments)
    try:
        declaration = narrowed(load(options.declaration), options.pairs, options.arms)
    except DeclarationError as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2
    quiet()
    folder = options.out / declaration.name
    plan = Plan(declaration, folder, options.any_code, read_only=options.command == "table")
    began = time.perf_counter()
    try:
        results = run_all(plan, options.workers, progress if options.command == "run" else lambda text: None)
    except DeclarationError as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2
    text = _written(declaration, results, folder)
    print(text)
    if options.command == "run":
        _note_run(folder, time.perf_counter() - began, options.workers, arguments)
    return int(any(result.refused or any(arm.error for arm in result.arms) for result in results))


def narrowed(declaration: Declaration, pairs: Sequence[str] | None, arms: Sequence[str] | None) -> Declaration:
    """Only these pairs and arms. `DeclarationError` for a name that it does not have."""
    for what, names, known in (("pair", pairs, declaration.pairs), ("arm", arms, declaration.arms)):
        if unknown := set(names or ()) - set(known):
            raise DeclarationError(f"There is no {what} {', '.join(sorted(unknown))}; known are {', '.join(known)}.")
    chosen = {
        name: replace(pair, arms=tuple(arm for arm in pair.arms if arms is None or arm in arms))
        for name, pair in declaration.pairs.items()
        if pairs is None or name in pairs
    }
    return replace(declaration, pairs=chosen)


def _written(declaration: Declaration, results: Sequence[PairResult], folder: Path) -> str:
    """The table, written beside the pictures."""
    from .plots import draw
    from .table import show

    text = show(declaration, results)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    draw(declaration, results, folder)
    return text


def _note_run(folder: Path, seconds: float, workers: int, arguments: Sequence[str] | None) -> None:
    """Command, date and machine, beside the table."""
    from measure import machine

    words = list(arguments) if arguments is not None else sys.argv[1:]
    note = {
        "command": f"python -m benchmarks.quality {shlex.join(words)}",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": machine(),
        "workers": workers,
        "seconds": round(seconds, 1),
    }
    with (folder / "runs.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(note) + "\n")


if __name__ == "__main__":
    sys.exit(main())
