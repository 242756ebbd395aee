"""On a terminal a long phase counts its seconds; in a pipe it is two lines."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import pytest

COLUMNS = 80
RUN = """
import logging, time
import tqdm.auto
from diglot import phases
from diglot.cli.screen import show_phases
phases.LONG = 0.05
show_phases()
with phases.phase("Working"):
"""
SLEEPS = "    time.sleep(1.0)"
# Another library's bar, which is drawn below the count, ends above it and was wider.
OTHER_BAR = """
    time.sleep(0.3)
    for _ in tqdm.auto.tqdm(range(4), desc="Loading weights", mininterval=0):
        time.sleep(0.1)
    time.sleep(%s)
"""
FAILS = f"{OTHER_BAR % 0.1}    raise SystemExit('It failed.')"
WARNS = "    time.sleep(1.2)\n    logging.getLogger('diglot.x').warning('A warning.')\n    time.sleep(0.2)"


def on_a_terminal(run: str, **environment: str) -> str:
    """What a terminal is sent on standard error."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    variables = {**os.environ, "TERM": "xterm", **environment}
    with subprocess.Popen([sys.executable, "-c", run], stderr=slave, stdout=subprocess.DEVNULL, env=variables):
        os.close(slave)
        seen, end = b"", time.monotonic() + 60
        while True:
            assert time.monotonic() < end, seen
            try:
                seen += os.read(master, 4096)
            except OSError:  # the other end is closed
                break
        os.close(master)
    return seen.decode()


def lines(sent: str) -> list[str]:
    """What then stands on the terminal, as far as bars use it."""
    result, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[\d;]*[A-Za-z]|.", sent, re.S):
        if part in ("\r", "\n"):
            row, column = row + (part == "\n"), 0 if part == "\r" else column
            result += [""] * (row + 1 - len(result))
        elif part == "\x1b[A":
            row -= 1
        elif part == "\x1b[K":
            result[row] = result[row][:column]
        elif part != "\x1b[0m":
            assert not part.startswith("\x1b"), part
            result[row] = result[row].ljust(column)[:column] + part + result[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in result]


def test_a_long_phase_on_a_terminal_shows_that_it_goes_on() -> None:
    sent = on_a_terminal(RUN + SLEEPS)
    assert "00:00 Working" in sent
    assert lines(sent) == ["Working ...", "Working: done in 1 s", ""]


@pytest.mark.parametrize("after", [0.1, 1.5])
def test_nothing_of_a_bar_stays_behind_a_line(after: float) -> None:
    first, bar, done, rest = lines(on_a_terminal(RUN + OTHER_BAR % after))
    assert (first, rest) == ("Working ...", "") and bar.startswith("Loading weights: 100%")
    assert re.fullmatch(r"Working: done in \d s", done)


def test_nothing_of_a_bar_stays_behind_an_error() -> None:
    assert "It failed." in lines(on_a_terminal(RUN + FAILS))


def test_a_warning_has_a_line_of_its_own_while_seconds_are_counted() -> None:
    assert lines(on_a_terminal(RUN + WARNS)) == ["Working ...", "A warning.", "Working: done in 1 s", ""]


def test_warnings_of_libraries_have_lines_of_their_own_too() -> None:
    """By a handler of the library's, as transformers has one, and by `warnings`."""
    library = "import logging, warnings\nlib = logging.getLogger('lib')\nlib.addHandler(logging.StreamHandler())\n"
    warns = "    time.sleep(1.2)\n    lib.warning('A warning.')\n    warnings.warn('Another.')\n    time.sleep(0.2)"
    first, one, two, *_, done, rest = lines(on_a_terminal(library + RUN + warns))
    assert (first, one, done, rest) == ("Working ...", "A warning.", "Working: done in 1 s", "")
    assert re.fullmatch(r"<string>:\d+: UserWarning: Another\.", two)


@pytest.mark.parametrize("body", [SLEEPS, WARNS])
def test_in_a_pipe_a_phase_is_named_and_timed_and_nothing_else(body: str) -> None:
    done = subprocess.run([sys.executable, "-c", RUN + body], capture_output=True, text=True, check=True)
    warned = "A warning.\n" if body is WARNS else ""
    assert done.stderr == f"Working ...\n{warned}Working: done in 1 s\n" and not done.stdout


def test_a_terminal_without_control_sequences_is_sent_none() -> None:
    assert "\x1b" not in on_a_terminal(RUN + SLEEPS, TERM="dumb")


def test_a_long_message_ends_its_lines_between_words_on_a_terminal_alone() -> None:
    words = "Nothing of this sentence may be cut in the middle of a word, wherever the terminal ends, "
    run = f"from diglot.cli.main import main\nmain(['{words}'])"
    sent = on_a_terminal(run)
    assert all(len(line) <= COLUMNS for line in sent.split("\r\n")) and words.strip() in " ".join(sent.split())
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True)
    assert len(done.stderr.splitlines()) == 1
