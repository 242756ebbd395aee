"""A logger that says less for a while."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def at_level(name: str, level: int) -> Iterator[None]:
    """The logger of this name says only what is at least as grave as `level`; afterwards what it said before."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
