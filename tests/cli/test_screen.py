"""On a terminal a long phase counts its seconds; in a pipe it is two lines."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import time

RUN = """
import time
import tqdm.auto
from diglot import phases
from diglot.cli.screen import show_phases
phases.LONG = 0.05
show_phases()
with phases.phase("Working"):
    time.sleep(1.0)
"""


def test_a_long_phase_on_a_terminal_shows_that_it_goes_on() -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with subprocess.Popen([sys.executable, "-c", RUN], stderr=slave, stdout=subprocess.DEVNULL) as process:
        os.close(slave)
        seen, end = b"", time.monotonic() + 60
        while process.poll() is None or b"done" not in seen:
            assert time.monotonic() < end, seen
            try:
                seen += os.read(master, 4096)
            except OSError:  # the other end is closed
                break
        os.close(master)
    assert process.returncode == 0
    before, _, after = seen.decode().partition("00:00 Working")
    assert before.startswith("Working ...") and "Working: done in 1 s" in after


def test_in_a_pipe_a_phase_is_named_and_timed_and_nothing_else() -> None:
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=True)
    assert done.stderr == "Working ...\nWorking: done in 1 s\n" and not done.stdout
