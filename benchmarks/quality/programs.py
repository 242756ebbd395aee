"""Runs a program that a model wrote against tests, in a process of its own with bounds on time and memory.

That bounds accidents, not malice: the process is no sandbox against a program that wants to do harm. A declaration has
to say `run_programs: true` before any is run; do it in a container or a virtual machine.
"""

from __future__ import annotations

import os
import resource
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS, MEMORY = 10, 2 * 2**30


def passes(program: str, tests: str, seconds: float = SECONDS) -> bool:
    """Does the program run, and the tests after it, to the end? What it prints is thrown away."""
    end = secrets.token_hex(16)  # a file that only the end makes: a program may leave with code 0 before its tests
    source = f"{program}\n\n{tests}\n\nopen({end!r}, 'w').close()\n"
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(
                [sys.executable, "-I", "-c", source],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={"PATH": os.defpath, "HOME": folder},
                timeout=seconds,
                preexec_fn=_bound,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return False
        except (OSError, ValueError):  # too long for a command line, or a null byte: no program
            return False
        return (Path(folder) / end).exists()


def _bound() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
