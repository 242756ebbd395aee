"""Benchmarks silence logging for the process that they run in; here that is one with other tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def logging_is_given_back() -> Iterator[None]:
    """What a test has silenced is heard again after it."""
    yield
    logging.disable(logging.NOTSET)
