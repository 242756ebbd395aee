"""Both vocabularies coarse-grained onto one partition: the longest shared token that a token's bytes start with.

At every boundary that both tokenizations share, both models have read the same bytes, and both distributions of the
next token become distributions over the same cells: shared tokens, first bytes where no shared token fits, stop, and
the rest.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from diglot.batches import Written
from diglot.objectives.base import RowObjective, at_least_float32, check_range
from diglot.objectives.divergences import generalized_jsd
from diglot.objectives.masses import gathered, log_mass
from diglot.objectives.pair import Pair
from diglot.objectives.scores import Rows, Values
from diglot.objectives.spanning import plain_tokens
from diglot.vocabulary.maps import shared_prefix_cells


class SharedPrefix(RowObjective):
    """Generalised JSD between the two distributions of the next token's cell, in nats per shared boundary.

    Rows: those that predict the first token of each chunk on either side. Both are proper distributions over the same
    `K + 258` cells, so every divergence is proper on them: zero if and only if the cell distributions agree. With
    equal vocabularies the cells are the tokens and the value is the JSD (control ids in one cell, the stop set in
    another).

    It sees all alternatives to what was written, also where the two sides cut the text differently, but tells tokens
    apart only as far as they begin with different shared tokens: "un|believ|able" and "un|bear|able" are one cell for a
    side that has them whole if "un" is the longest that both have. And a side whose next token is long puts its mass
    into the cell of the longest shared prefix, one that would write it in pieces into that of its first piece: equal
    distributions over text give zero only if both sides cut text at the same places. The oracle measures by how much.

    Args:
        beta: in [0, 1]; 0 forward KL(teacher || student), 1 reverse KL(student || teacher).
    """

    name = "shared_prefix"

    def __init__(self, pair: Pair, *, beta: float = 0.5) -> None:
        super().__init__(pair)
        check_range("beta", beta, 0.0, 1.0)
        self.beta = beta
        tables = pair.need_tables(self.name)
        self.tables = tables
        cells = shared_prefix_cells(tables.student, tables.teacher)
        self.count = cells.count + 1  # and stop
        self.cells_s, self.cells_t = (
            torch.from_numpy(side).index_fill(0, stop.cpu(), cells.count)
            for side, stop in ((cells.student, pair.stop_s), (cells.teacher, pair.stop_t))
        )

    def rows(self, written: Written) -> Rows:
        """The rows at the beginning of every exact chunk, stop included."""
        exact = np.flatnonzero(written.alignment.chunk_exact)
        first_s, first_t = written.first_s[exact], written.first_t[exact]
        plain = plain_tokens(written.student, self.tables.student)[first_s]
        plain &= plain_tokens(written.teacher, self.tables.teacher)[first_t]
        return Rows(torch.from_numpy(first_s[plain]), torch.from_numpy(first_t[plain]))

    def __call__(self, logits_s: Tensor, logits_t: Tensor, **inputs: Tensor) -> Values:
        logp_s, logp_t = (
            log_mass(gathered(at_least_float32(logits).softmax(-1), cells, self.count))
            for logits, cells in ((logits_s, self.cells_s), (logits_t, self.cells_t))
        )
        return Values(generalized_jsd(logp_s, logp_t, self.beta))
