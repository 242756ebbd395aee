"""Lines for a person on standard error while a command works: phases and warnings, of the main process only."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import textwrap
import threading
from collections.abc import Iterator

from diglot import phases


class _Screen(logging.Handler):
    """Writes lines to standard error as it is at that moment, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        self.write(self.format(record))

    def write(self, text: str) -> None:
        """As the stream of another library's handler, too."""
        text = _erase() + fitted(text.removesuffix("\n"))
        if "tqdm" in sys.modules:
            from tqdm.auto import tqdm

            tqdm.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)


_SCREEN = _Screen(logging.INFO)


def _erase() -> str:
    """What clears the rest of a terminal's line, where a bar may have been that was longer; nothing elsewhere."""
    return "\x1b[K" if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else ""


def fitted(text: str) -> str:
    """`text` for standard error: on a terminal its lines end between words, so that none is cut in two.

    Lines that begin with a space, commands to copy, stay as they are, as do all lines elsewhere.
    """
    try:
        width = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return text
    wrap = textwrap.TextWrapper(width or 80, break_long_words=False, break_on_hyphens=False)
    return "\n".join(line if line.startswith(" ") else wrap.fill(line) for line in text.split("\n"))


def show_phases() -> None:
    """From now on phases are shown; of several processes the first one shows its own."""
    if int(os.environ.get("RANK", "0")) == 0:
        phases.logger.setLevel(logging.INFO)
        phases.logger.addHandler(_SCREEN)  # a second time changes nothing
        if sys.stderr.isatty():
            phases.shown = _counting
            logging.lastResort = _Screen(logging.WARNING)  # warnings that nobody handles: not behind the count
            logging.captureWarnings(True)  # those of `warnings`
            logging.getLogger("py.warnings").addHandler(_SCREEN)


def _take_over() -> None:
    """What libraries write to standard error by handlers of their own stands above the count, too."""
    for name in list(logging.root.manager.loggerDict):
        for handler in logging.getLogger(name).handlers:
            if type(handler) is logging.StreamHandler and handler.stream is sys.stderr:
                handler.setStream(_SCREEN)


@contextlib.contextmanager
def _counting(text: str) -> Iterator[None]:
    """The time that a long phase has taken so far, counted on the last line until it ends."""
    ended = threading.Event()
    _take_over()

    def count() -> None:
        if ended.wait(phases.LONG):
            return
        from tqdm.auto import tqdm

        # The time stands first: a long name is cut at the terminal's width.
        form = f"{_erase()}{{elapsed}} {{desc}}"
        with tqdm(desc=text, bar_format=form, initial=0, leave=False, dynamic_ncols=True) as bar:
            bar.start_t -= phases.LONG
            while not ended.wait(1.0):
                bar.refresh()
        print(_erase(), end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
