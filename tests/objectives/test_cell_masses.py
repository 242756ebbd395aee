"""Masses of cells: the sums that autograd would find, and their gradient, in one order of addition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from diglot.objectives.cell_masses import CellColumns, CellMasses

TOKENS, ROWS = 40, 7
STOP, SILENT = torch.tensor([38, 3]), torch.tensor([39])


def cells_of(seed: int, hot: bool = False) -> np.ndarray:
    """A cell for each token, named by one of its own; -1 for stop, and for what has no text."""
    chosen = np.random.default_rng(seed)
    names = np.array([5]) if hot else np.array([0, 5, 6, 11, 20])
    cell = np.where(chosen.random(TOKENS) < (0.95 if hot else 0.6), chosen.choice(names, TOKENS), np.arange(TOKENS))
    cell[names] = names
    cell[[38, 3, 39]] = -1
    return cell


def problem(cell: np.ndarray, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, four cells of each row, one of them sometimes absent, and a token of each row."""
    chosen = np.random.default_rng(seed)
    logits = torch.from_numpy(chosen.normal(size=(ROWS, TOKENS)) * 3)
    names = np.unique(cell[cell >= 0])
    column = np.stack([chosen.permutation(names)[:4] for _ in range(ROWS)])
    column[::2, 1] = -1
    return logits, torch.from_numpy(column), torch.from_numpy(chosen.integers(0, TOKENS, ROWS))


def added_up(logits: Tensor, cell: np.ndarray, column: Tensor, token: Tensor) -> tuple[Tensor, ...]:
    """The same sums, written for autograd."""
    probs, cells = logits.softmax(-1), torch.from_numpy(cell)
    inside = (cells[None, None] == column[..., None]) & (column >= 0)[..., None]
    single = probs[torch.arange(len(probs)), token]
    return (probs[:, None] * inside).sum(-1), single, probs[:, STOP].sum(-1), probs[:, SILENT].sum(-1)


@pytest.mark.parametrize("cell", [cells_of(0), cells_of(1), cells_of(2, hot=True), np.arange(TOKENS)])
def test_masses_and_their_gradient_are_those_of_the_sums(cell: np.ndarray) -> None:
    logits, column, token = problem(cell)
    of_all = []
    for masses in (
        lambda x: CellMasses.apply(x, CellColumns.of(cell), column, token, STOP, SILENT),
        lambda x: added_up(x, cell, column, token),
    ):
        leaf = logits.clone().requires_grad_()
        sums = masses(leaf)
        weights = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype).reshape(x.shape) for x in sums]
        sum((x.clamp(min=1e-8).log() * w).sum() for x, w in zip(sums, weights, strict=True)).backward()
        of_all.append((*sums, leaf.grad))
    for one, other in zip(*of_all, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_a_hot_cell_keeps_the_mass_of_an_unlikely_one() -> None:
    """In float32, with a neighbour that holds nearly all of the mass: no sum over both rounds it away."""
    cell = cells_of(2, hot=True)
    cell[[10, 12]] = 10
    logits = torch.zeros(1, TOKENS)
    logits[0, [10, 12]] = -60.0
    (mass, *_) = CellMasses.apply(logits, CellColumns.of(cell), torch.tensor([[10]]), torch.tensor([0]), STOP, SILENT)
    exact = logits.double().softmax(-1)[0, [10, 12]].sum()
    assert float(mass) == pytest.approx(float(exact), abs=1e-15)


def test_the_same_bits_come_again_whatever_the_block() -> None:
    cell = cells_of(3, hot=True)
    logits, column, token = problem(cell, 5)
    logits, columns = logits.float(), CellColumns.of(cell)
    runs = []
    for parts in ([ROWS], [1] * ROWS, [3, 4]):
        leaf = logits.clone().requires_grad_()
        pieces = zip(*(x.split(parts) for x in (leaf, column, token)), strict=True)
        masses = torch.cat([CellMasses.apply(x, columns, c, t, STOP, SILENT)[0] for x, c, t in pieces])
        masses.square().sum().backward()
        runs.append((masses.detach(), leaf.grad))
    for again in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], again, strict=True))
