"""A Chromium for the tests that look at pages: the one that is installed, or one that is installed now.

python tests/support/browser.py    # find or install one, and say where it is; `make test-real` does this
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find() -> str | None:
    """Path of a Chromium, of the system or of playwright; `DIGLOT_CHROMIUM` names another."""
    named = os.environ.get("DIGLOT_CHROMIUM")
    if named:
        return named
    for name in NAMES:
        if path := shutil.which(name):
            return path
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
    return str(own) if own.exists() else None


def install() -> None:
    """Ask playwright, then Debian's or Ubuntu's package manager; the first that works is enough."""
    apt = ["apt-get"] if hasattr(os, "geteuid") and os.geteuid() == 0 else ["sudo", "-n", "apt-get"]
    for commands in (
        [[sys.executable, "-m", "playwright", "install", "chromium"]],
        [[*apt, "update", "-qq"], [*apt, "install", "-y", "-qq", "--no-install-recommends", "chromium"]],
    ):
        try:
            if all(subprocess.run(c, timeout=600).returncode == 0 for c in commands) and find():
                return
        except (OSError, subprocess.TimeoutExpired) as error:
            print(f"{commands[-1][0]}: {error}", file=sys.stderr)


def main() -> int:
    if find() is None:
        install()
    path = find()
    if path is None:
        print(
            "No Chromium was found, and neither playwright nor apt-get could install one. Install Chromium or Chrome, "
            "or set DIGLOT_CHROMIUM to one: the report is tested in a real browser.",
            file=sys.stderr,
        )
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
