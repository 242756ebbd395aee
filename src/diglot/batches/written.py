"""The written text of a batch as both sides cut it: what an objective may know before any model has run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diglot.alignment import Alignment, Side, starts
from diglot.arrays import Bools, Ints


@dataclass(frozen=True)
class WrittenSide:
    """The scored tokens of one side, packed over the batch, `[N]` each, in order of segment and position."""

    ids: Ints
    end: Ints  # byte end inside the segment; length + 1 for the stop token
    segment: Ints
    exact: Bools  # are the token's bytes the bytes of the text?
    stop: Bools

    @cached_property
    def start(self) -> Ints:
        """Byte start inside the segment."""
        return starts(Side(self.end, self.segment, self.exact, self.stop))


@dataclass(frozen=True)
class Written:
    """Both sides' tokens of the same segments, and their alignment, as numpy arrays."""

    student: WrittenSide
    teacher: WrittenSide
    alignment: Alignment[NDArray[Any]]
    texts: Sequence[bytes]  # of each segment, as far as both sides hold it
    left_out: Bools | None = None  # [N_s] student tokens of a role that is not scored; they are not exact either

    @cached_property
    def usable_s(self) -> Bools:
        """Which student tokens lie in an exact chunk, `[N_s]`."""
        usable: Bools = self.alignment.in_exact_chunk(self.alignment.chunk_s)
        return usable

    @cached_property
    def usable_t(self) -> Bools:
        """Which teacher tokens lie in an exact chunk, `[N_t]`."""
        usable: Bools = self.alignment.in_exact_chunk(self.alignment.chunk_t)
        return usable

    @cached_property
    def first_s(self) -> Ints:
        """The student token that opens each chunk, `[C]`."""
        return first_of_chunks(self.alignment.chunk_s, self.alignment.num_chunks)

    @cached_property
    def first_t(self) -> Ints:
        """The teacher token that opens each chunk, `[C]`."""
        return first_of_chunks(self.alignment.chunk_t, self.alignment.num_chunks)


def first_of_chunks(chunk: Ints, num_chunks: int) -> Ints:
    """Index of the first token of every chunk, `[C]`. Chunks ascend; tokens in none have -1."""
    inside = np.flatnonzero(chunk >= 0)
    return inside[np.searchsorted(chunk[inside], np.arange(num_chunks))]
