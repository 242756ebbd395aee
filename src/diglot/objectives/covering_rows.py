"""What is read of the teacher's rows, part by part, before they are gone.

Shapes: `r` rows of a pass, `q` single tokens, `Q` pairs of a row and a boundary that its tokens run past, `L` tokens of
their ranges, `K` likeliest tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diglot.objectives.covering_plan import EarlierRows
from diglot.objectives.masses import ragged

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
NEGLIGIBLE = 1e-4  # of the mass of a range: a token that is not looked at by itself


@dataclass(frozen=True)
class Table:
    """What rows are read by."""

    stop_ids: Tensor
    silent_ids: Tensor  # control tokens that do not stop
    has_bytes: Tensor  # bool [V_t]
    sorted_ids: Tensor  # [V_t] of the teacher's trie
    top_k: int


@dataclass(frozen=True)
class RowsRead:
    """In numpy; masses as natural logarithms."""

    single: Floats  # [q]
    stop: Floats  # [r] of the stop set
    silent: Floats  # [r] of control tokens that do not stop
    top_ids: Ints  # [r, K] likeliest tokens that have bytes
    top: Floats  # [r, K]
    leaf_pair: Ints  # [L]
    leaf_id: Ints  # [L]
    leaf: Floats  # [L]
    range_total: Floats  # [Q] of each pair's whole range

    def without(self, pairs: NDArray[np.bool_]) -> RowsRead:
        """With no mass of some pairs, `[Q]`."""
        leaf = np.where(pairs[self.leaf_pair], -np.inf, self.leaf)
        return replace(self, leaf=leaf, range_total=np.where(pairs, -np.inf, self.range_total))

    def with_more(self, more: RowsRead) -> RowsRead:
        """Both, one behind the other: rows and pairs of `more` are numbered behind these."""
        pairs = len(self.range_total)
        joined = [
            np.concatenate([getattr(self, name), getattr(more, name) + (pairs if name == "leaf_pair" else 0)])
            for name in self.__dataclass_fields__
        ]
        return RowsRead(*joined)


NO_PAIRS = EarlierRows(*(np.zeros(0, dtype=np.int64),) * 7, np.zeros(0, dtype=np.bool_))


@torch.no_grad()
def read_rows(
    parts: Iterable[tuple[slice, Tensor]], row: Ints, token: Ints, pairs: EarlierRows, first: int, table: Table
) -> RowsRead:
    """One pass over log-probs `[r, V_t]`, part by part.

    Args:
        row, token: `[q]`, which single tokens of which rows are read; rows are numbered from `first`.
        pairs: whose ranges are read.
    """
    row, pair_row = row - first, pairs.row - first
    order, by_row = np.argsort(row, kind="stable"), np.argsort(pair_row, kind="stable")
    sorted_row, sorted_pair = row[order], pair_row[by_row]
    found, total = np.zeros(len(row)), np.full(len(pair_row), -np.inf)
    stop, silent, top_ids, top = [], [], [], []
    leaf_pair, leaf_id, leaf = [], [], []
    no_piece = torch.zeros(len(table.has_bytes)).to(table.has_bytes.device).masked_fill(~table.has_bytes, -torch.inf)
    no_piece[table.stop_ids.to(no_piece.device)] = -torch.inf
    for at, logp in parts:
        device, rows = logp.device, slice(at.start, at.start + len(logp))
        stop.append(logp[:, table.stop_ids.to(device)].logsumexp(-1))
        silent.append(logp[:, table.silent_ids.to(device)].logsumexp(-1))
        best = (logp + no_piece.to(device)).topk(min(table.top_k, logp.shape[1]), dim=-1)
        top_ids.append(best.indices.cpu())
        top.append(best.values.cpu())
        low, high = np.searchsorted(sorted_row, [rows.start, rows.stop])
        here = order[low:high]
        index = [torch.from_numpy(x).to(device) for x in (row[here] - rows.start, token[here])]
        found[here] = logp[index[0], index[1]].double().cpu().numpy()
        low, high = np.searchsorted(sorted_pair, [rows.start, rows.stop])
        if high > low:
            pair = by_row[low:high]
            bounds = [torch.from_numpy(x[pair]).to(device) for x in (pairs.low, pairs.high)]
            place, owner = ragged(*bounds)
            ids = table.sorted_ids.to(device)[place]
            value = logp[torch.from_numpy(pair_row[pair] - rows.start).to(device)[owner], ids].double()
            most = torch.full((len(pair),), -torch.inf, dtype=torch.float64, device=device)
            most.scatter_reduce_(0, owner, value, "amax")
            sums = torch.zeros_like(most).index_add_(0, owner, (value - most[owner]).exp())
            total[pair] = (most + sums.log()).cpu().numpy()
            kept = value > most[owner] + np.log(NEGLIGIBLE)
            leaf_pair.append(pair[owner[kept].cpu().numpy()])
            leaf_id.append(ids[kept].cpu().numpy())
            leaf.append(value[kept].cpu().numpy())
    empty = [np.zeros(0, dtype=np.int64)]
    return RowsRead(
        found,
        torch.cat(stop).double().cpu().numpy(),
        torch.cat(silent).double().cpu().numpy(),
        torch.cat(top_ids).numpy(),
        torch.cat(top).double().numpy(),
        np.concatenate(leaf_pair or empty),
        np.concatenate(leaf_id or empty),
        np.concatenate(leaf or [np.zeros(0)]),
        total,
    )
