"""Lines for a person on standard error while a command works: phases and warnings, of the main process only."""

from __future__ import annotations

import logging
import os
import sys

from diglot import phases


class _Screen(logging.Handler):
    """Writes to standard error as it is at that moment, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if "tqdm" in sys.modules:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)


_SCREEN = _Screen(logging.INFO)


def show_phases() -> None:
    """From now on phases are shown; of several processes the first one shows its own."""
    if int(os.environ.get("RANK", "0")) == 0:
        phases.logger.setLevel(logging.INFO)
        phases.logger.addHandler(_SCREEN)  # a second time changes nothing
