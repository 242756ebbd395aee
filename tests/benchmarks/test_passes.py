"""How often the loss stage goes over rows of logits, counted in bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from passes import Traffic

from diglot.heads import Head, reduce_rows
from diglot.objectives import Values
from diglot.objectives.cell_masses import CellColumns, CellMasses
from diglot.objectives.jsd import full_jsd

ROWS, TOKENS = 8, 6000
ONE_SIDE = 4 * ROWS * TOKENS
"""Bytes of the rows of one side."""


def test_what_is_counted_is_what_is_read_and_written() -> None:
    wide, narrow = torch.ones(ROWS, TOKENS), torch.ones(ROWS, 4)
    with Traffic(TOKENS) as traffic:
        wide + wide.exp()  # one read, one written; two read, one written
        narrow + narrow
        wide[:, :4].clone()
        wide.t()
        wide[torch.tensor([1, 2])]  # two rows
    assert sum(traffic.bytes.values()) == ONE_SIDE * 5 + 4 * TOKENS * 4


@pytest.mark.parametrize(("beta", "most"), [(0.5, 20), (0.0, 13), (1.0, 14)])
def test_two_rows_of_one_vocabulary_are_gone_over_few_times(beta: float, most: int) -> None:
    """The default for equal vocabularies, with its gradient. Autograd's own way took 42."""
    draw = torch.Generator().manual_seed(0)
    heads = [Head(torch.nn.Linear(4, TOKENS, bias=False)) for _ in range(2)]
    hidden = torch.randn(ROWS, 4, generator=draw, requires_grad=True)
    rows, weight = torch.arange(ROWS), torch.ones(ROWS)
    with Traffic(TOKENS) as traffic:
        total, _ = reduce_rows(
            lambda s, t: Values(full_jsd(s, t, beta)),
            hidden,
            heads[0],
            hidden.detach(),
            heads[1],
            rows,
            rows,
            weight,
            ROWS,
        )
        total.backward()
    assert sum(traffic.bytes.values()) / (2 * ONE_SIDE) <= most


def test_cells_of_rows_are_found_in_few_passes() -> None:
    """Of the student's side of the default for unequal vocabularies, with its gradient."""
    draw = np.random.default_rng(0)
    cell = np.where(draw.random(TOKENS) < 0.1, draw.integers(0, 500, TOKENS), np.arange(TOKENS))
    cell[:500] = np.arange(500)
    columns, logits = CellColumns.of(cell), torch.randn(ROWS, TOKENS, requires_grad=True)
    column = torch.from_numpy(np.stack([draw.permutation(500)[:64] for _ in range(ROWS)]))
    sets = torch.tensor([TOKENS - 1]), torch.tensor([TOKENS - 2])
    with Traffic(TOKENS) as traffic:
        masses, *others = CellMasses.apply(logits, columns, column, torch.arange(ROWS), *sets)
        (masses.sum() + sum(x.sum() for x in others)).backward()
    assert sum(traffic.bytes.values()) / ONE_SIDE <= 4
