"""Known faults of the packages in constraints.txt, by pip-audit, which asks PyPI's database.

`.venv/audit/bin/python tests/support/audit.py`, in the environment that `make audit` makes. Exit code 0: all were
asked about and none is known to have one. 1: faults, or packages that the database does not know. 75: it was not
reached.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
NOT_REACHED = 75  # EX_TEMPFAIL


def verdict(packages: Sequence[dict[str, Any]]) -> tuple[int, list[str]]:
    """The exit code and what to say, of pip-audit's list of packages.

    Behind a mirror of the packages alone, pip-audit finds none of them, and says that no faults are known.
    """
    unasked = [f"{one['name']}: {one['skip_reason']}" for one in packages if "skip_reason" in one]
    faults = [
        f"{one['name']} {one['version']}: {fault['id']}, fixed in {', '.join(fault['fix_versions']) or 'no version'}"
        for one in packages
        for fault in one.get("vulns", [])
    ]
    if len(unasked) == len(packages):
        return NOT_REACHED, [f"NOT AUDITED: PyPI's database knows none of the {len(packages)} packages; no network?"]
    sentence = f"{len(packages) - len(unasked)} of {len(packages)} packages asked about, {len(faults)} known faults"
    return int(bool(faults or unasked)), [*faults, *unasked, sentence]


def main() -> int:
    """Ask about all; print what was found."""
    words = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    command = [sys.executable, "-m", "pip_audit", *words, "--requirement", str(CONSTRAINTS)]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        print(f"NOT AUDITED: pip-audit ended with code {done.returncode}: {done.stderr.strip()[-500:]}")
        return NOT_REACHED if "Connection" in done.stderr else 1
    code, lines = verdict(packages)
    print(*lines, sep="\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
