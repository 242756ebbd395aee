"""What a run does right now, as log lines of the logger `diglot.phases`: nothing that takes long is silent."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

logger = logging.getLogger(__name__)

LOADING = "Loading torch and transformers"  # the phase that every command with models begins with
LONG = 2.0  # seconds from which on it is said how long a phase took
shown: Callable[[str], AbstractContextManager[Any]] = contextlib.nullcontext  # what a terminal does meanwhile


@contextlib.contextmanager
def phase(text: str) -> Iterator[None]:
    """Log `text` when the block starts, and how long it took if that was long. A block that fails has its own error."""
    start = time.monotonic()
    logger.info("%s ...", text)
    with shown(text):
        yield
    if (took := time.monotonic() - start) >= LONG:
        logger.info("%s: done in %.0f s", text, took)
