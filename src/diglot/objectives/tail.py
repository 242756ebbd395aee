"""Tokens that a teacher is asked about beside its reading of the whole text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diglot.arrays import Ints


@dataclass(frozen=True)
class TailTokens:
    """The teacher's tokens for the last bytes of a prefix, where they are not those of the whole text, `[E]` each."""

    ids: Ints
    before: Ints  # the scored teacher token in whose place the branch goes another way
    depth: Ints  # 0 for the first token of a branch
    row: Ints  # the row that predicts it: a teacher token's, or `N_t +` the branch token before it

    def ending_at(self, last: Ints, first: int) -> tuple[TailTokens, Ints]:
        """The branches whose last tokens are these, `[n]`, and where they end then. `first` is the row behind the
        first branch token of all."""
        length = self.depth[last] + 1
        end = np.cumsum(length)
        at = np.repeat(last - end + 1, length) + np.arange(int(length.sum()))
        row = np.where(self.depth[at] > 0, first + np.arange(len(at)) - 1, self.row[at])
        return TailTokens(self.ids[at], self.before[at], self.depth[at], row), end - 1
