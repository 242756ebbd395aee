"""Masses of a few cells of each row, from whole rows of logits, in few passes over them.

A cell is a token and more of them; all tokens that are in another one's cell stand side by side, so that a cell's mass
is its own token's and the sum of a segment. Nothing is added up in an order that could change.

Shapes: `R` rows, `V` tokens, `K` cells of a row, `M` tokens that are in another one's cell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diglot.arrays import Ints
from diglot.batches.sending import sent_record


@dataclass(frozen=True)
class CellColumns:
    """Columns by cell."""

    moved: Tensor  # int64 [M] tokens in another one's cell, by cell
    number: Tensor  # int64 [M] counts those cells through
    lengths: Tensor  # int64 [names] how many others each of them has
    number_of: Tensor  # int64 [V] of each cell; `names` for one without others
    names: int  # how many cells have others

    @classmethod
    def of(cls, cell: Ints) -> CellColumns:
        """Of each token's cell, named by a token of it; -1 for none, `[V]`."""
        every = np.arange(len(cell))
        moved = np.flatnonzero((cell >= 0) & (cell != every))
        moved = moved[np.argsort(cell[moved], kind="stable")]
        names, number, lengths = np.unique(cell[moved], return_inverse=True, return_counts=True)
        number_of = np.full(len(cell), len(names))
        number_of[names] = np.arange(len(names))
        by_cell, numbers, sizes, known = map(torch.from_numpy, (moved, number, lengths, number_of))
        return cls(by_cell, numbers, sizes, known, len(names))

    def to(self, device: torch.device | str) -> CellColumns:
        """The same on `device`."""
        return sent_record(self, device)


class CellMasses(torch.autograd.Function):
    """Of logits `[R, V]`: the masses of cells `[R, K]`, of single tokens `[R]`, and of two sets of tokens, `[R]` each.

    `column` `[R, K]` names the cells, -1 for none (mass 0); `token` `[R]` the single tokens. Cells of a row differ, and
    have no token of the sets. Written out because autograd makes a matrix of the size of the logits for each use of the
    probabilities.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, cells: CellColumns, column: Tensor, token: Tensor, *sets: Tensor
    ) -> tuple[Tensor, ...]:
        probs = logits.softmax(-1)
        at, some = column.clamp(min=0), column >= 0
        masses = probs.gather(1, at)
        if len(cells.moved):
            # Down the columns of a copy that is transposed: `segment_reduce` adds up along the first dimension only.
            moved = probs.T.index_select(0, cells.moved).double()
            others = torch.segment_reduce(moved, "sum", lengths=cells.lengths, unsafe=True)
            none = others.new_zeros(1, len(probs))
            others = torch.cat([others, none]).T.gather(1, cells.number_of[at])
            masses = (masses.double() + others).to(probs.dtype)
        masses = masses.masked_fill(~some, 0.0)
        single = probs.gather(1, token[:, None])[:, 0]
        of_sets = [probs[:, ids].sum(-1) for ids in sets]
        ctx.cells = cells
        ctx.save_for_backward(probs, column, token, masses, single, *of_sets, *sets)
        return masses, single, *of_sets

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_masses: Tensor, of_single: Tensor, *of_sets: Tensor) -> tuple[Tensor | None, ...]:
        cells, (probs, column, token, masses, single, *rest) = ctx.cells, ctx.saved_tensors
        set_masses, sets = rest[: len(of_sets)], rest[len(of_sets) :]
        at, of_masses = column.clamp(min=0), of_masses.masked_fill(column < 0, 0.0)
        mean = (of_masses * masses).sum(-1) + of_single * single
        for gradient, mass in zip(of_sets, set_masses, strict=True):
            mean = mean + gradient * mass
        # d logit = p (g - mean), where g is not zero for few tokens only.
        of_logits = probs * -mean[:, None]
        for gradient, ids in zip(of_sets, sets, strict=True):
            of_logits.index_copy_(1, ids, probs[:, ids] * (gradient - mean)[:, None])
        if len(cells.moved):
            each = of_masses.new_zeros(len(probs), cells.names + 1)
            each.scatter_add_(1, cells.number_of[at], of_masses)  # cells without others meet in the last place
            of_moved = (each - mean[:, None])[:, cells.number].mul_(probs[:, cells.moved])
            of_logits.index_copy_(1, cells.moved, of_moved)
        of_logits.scatter_add_(1, at, probs.gather(1, at) * of_masses)
        of_logits.scatter_add_(1, token[:, None], (single * of_single)[:, None])
        return of_logits, None, None, None, *(None for _ in sets)
