"""Do version, changelog and citation agree? `python tests/support/release.py [TAG]`, or `make release-check`.

Without a tag the newest entry of CHANGELOG.md may still be "unreleased"; with one, such as v0.1.0, it must be dated
and of that version. Exit code 1, and one line for each thing that is wrong. Needs nothing but the standard library.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = {
    "pyproject.toml": r'^version = "(.+)"$',
    "src/diglot/__init__.py": r'^__version__ = "(.+)"$',
    "CITATION.cff": r"^version: (.+)$",
}


def problems(root: Path, tag: str | None = None) -> list[str]:
    """What has to be put right in the tree at `root` before it is released as `tag`."""
    versions = {name: _first(root / name, pattern) for name, pattern in VERSIONS.items()}
    version = versions["pyproject.toml"]
    wrong = [
        f"{name} says version {other}, pyproject.toml {version}" for name, other in versions.items() if other != version
    ]
    if tag is not None and tag != f"v{version}":
        wrong.append(f"the tag is {tag}, pyproject.toml says version {version}: the tag must be v{version}")
    return wrong + _of_changelog((root / "CHANGELOG.md").read_text(encoding="utf-8"), version, dated=tag is not None)


def _first(path: Path, pattern: str) -> str | None:
    match = re.search(pattern, path.read_text(encoding="utf-8"), re.M)
    return match.group(1) if match else None


def _of_changelog(text: str, version: str | None, dated: bool) -> list[str]:
    entries = re.split(r"^## ", text, flags=re.M)[1:]
    heading, _, body = entries[0].partition("\n") if entries else ("", "", "")
    number, _, date = heading.partition(" ")
    if number != version:
        return [f"the newest entry of CHANGELOG.md is {number or 'missing'}, pyproject.toml says version {version}"]
    wrong = []
    if not re.search(r"^- \S", body, re.M):
        wrong.append(f"the entry of {version} in CHANGELOG.md is empty: say what changed for users")
    if not re.fullmatch(r"\(\d{4}-\d{2}-\d{2}\)" if dated else r"\((\d{4}-\d{2}-\d{2}|unreleased)\)", date):
        rule = "its date as (YYYY-MM-DD)" if dated else "its date as (YYYY-MM-DD), or (unreleased)"
        wrong.append(f"the entry of {version} in CHANGELOG.md has {date or 'nothing'} behind the version: write {rule}")
    return wrong


if __name__ == "__main__":
    faults = problems(ROOT, *sys.argv[1:2])
    print(*(faults or ["version, changelog and citation agree"]), sep="\n")
    sys.exit(bool(faults))
