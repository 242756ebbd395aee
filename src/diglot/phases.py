"""What a run does right now, as log lines of the logger `diglot.phases`: nothing that takes long is silent."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

logger = logging.getLogger(__name__)

LONG = 2.0  # seconds from which on it is said how long a phase took


@contextlib.contextmanager
def phase(text: str) -> Iterator[None]:
    """Log `text` when the block starts, and how long it took if that was long. A block that fails has its own error."""
    start = time.monotonic()
    logger.info("%s ...", text)
    yield
    if (took := time.monotonic() - start) >= LONG:
        logger.info("%s: done in %.0f s", text, took)
