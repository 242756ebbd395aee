"""Lines for a person on standard error while a command works: phases and warnings, of the main process only."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator

from diglot import phases


class _Screen(logging.Handler):
    """Writes to standard error as it is at that moment, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if "tqdm" in sys.modules:
            from tqdm.auto import tqdm

            tqdm.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)


_SCREEN = _Screen(logging.INFO)


def show_phases() -> None:
    """From now on phases are shown; of several processes the first one shows its own."""
    if int(os.environ.get("RANK", "0")) == 0:
        phases.logger.setLevel(logging.INFO)
        phases.logger.addHandler(_SCREEN)  # a second time changes nothing
        if sys.stderr.isatty():
            phases.shown = _counting


@contextlib.contextmanager
def _counting(text: str) -> Iterator[None]:
    """The time that a long phase has taken so far, counted on the last line until it ends."""
    ended = threading.Event()

    def count() -> None:
        if ended.wait(phases.LONG):
            return
        from tqdm.auto import tqdm

        # The time stands first: a long name is cut at the terminal's width.
        with tqdm(desc=text, bar_format="{elapsed} {desc}", initial=0, leave=False, dynamic_ncols=True) as bar:
            bar.start_t -= phases.LONG
            while not ended.wait(1.0):
                bar.refresh()

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
