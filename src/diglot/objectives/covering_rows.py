"""What is read of the teacher's rows, part by part, before they are gone.

Shapes: `r` rows of a pass, `q` single tokens, `Q` pairs of a row and a boundary that its tokens run past, `L` tokens of
their ranges, `K` likeliest tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diglot.batches.sending import sent
from diglot.objectives.covering_plan import EarlierRows

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

    def to(self, device: torch.device | str) -> Table:
        """The same with its tensors on `device`."""
        stop, silent, has_bytes, order = (
            x.to(device) for x in (self.stop_ids, self.silent_ids, self.has_bytes, self.sorted_ids)
        )
        return Table(stop, silent, has_bytes, order, self.top_k)


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
    no_piece = ~table.has_bytes
    no_piece[table.stop_ids.to(no_piece.device)] = True
    numbers: dict[str, list[Tensor]] = {name: [] for name in ("stop", "silent", "top", "single", "total", "leaf")}
    ids: dict[str, list[Tensor]] = {name: [] for name in ("top_ids", "leaf_at", "leaf_id")}
    of_pairs = 0  # entries of ranges in earlier parts
    owners: list[Ints] = []
    for at, logp in parts:
        device, rows = logp.device, slice(at.start, at.start + len(logp))
        numbers["stop"].append(logp[:, table.stop_ids.to(device)].logsumexp(-1))
        numbers["silent"].append(logp[:, table.silent_ids.to(device)].logsumexp(-1))
        best = logp.masked_fill(no_piece.to(device), -torch.inf).topk(min(table.top_k, logp.shape[1]), dim=-1)
        numbers["top"].append(best.values)
        ids["top_ids"].append(best.indices)
        low, high = np.searchsorted(sorted_row, [rows.start, rows.stop])
        here = order[low:high]
        index = [sent(torch.from_numpy(x), device) for x in (row[here] - rows.start, token[here])]
        numbers["single"].append(logp[index[0], index[1]])
        low, high = np.searchsorted(sorted_pair, [rows.start, rows.stop])
        if high > low:
            pair = by_row[low:high]
            length = pairs.high[pair] - pairs.low[pair]
            owner = np.repeat(np.arange(len(pair)), length)
            place = np.arange(len(owner)) - np.repeat(np.cumsum(length) - length - pairs.low[pair], length)
            host = owner, place, pair_row[pair][owner] - rows.start
            owner_at, place_at, row_at = (sent(torch.from_numpy(x), device) for x in host)
            entry = table.sorted_ids.to(device)[place_at]
            value = logp[row_at, entry].double()
            most = torch.full((len(pair),), -torch.inf, dtype=torch.float64, device=device)
            most.scatter_reduce_(0, owner_at, value, "amax")
            sums = torch.zeros_like(most).index_add_(0, owner_at, (value - most[owner_at]).exp())
            numbers["total"].append(most + sums.log())
            kept = (value > most[owner_at] + math.log(NEGLIGIBLE)).nonzero()[:, 0]
            numbers["leaf"].append(value[kept])
            ids["leaf_id"].append(entry[kept])
            ids["leaf_at"].append(kept + of_pairs)
            owners.append(pair[owner])
            of_pairs += len(owner)
    number, whole = _to_host(numbers, np.float64), _to_host(ids, np.int64)
    single, total = np.zeros(len(row)), np.full(len(pair_row), -np.inf)
    single[order], total[by_row] = number["single"], number["total"]
    count, top_k = len(number["stop"]), numbers["top"][0].shape[1]
    owner = np.concatenate(owners) if owners else np.zeros(0, dtype=np.int64)
    return RowsRead(
        single,
        number["stop"],
        number["silent"],
        whole["top_ids"].reshape(count, top_k),
        number["top"].reshape(count, top_k),
        owner[whole["leaf_at"]],
        whole["leaf_id"],
        number["leaf"],
        total,
    )


def _to_host(parts: dict[str, list[Tensor]], kind: type[np.generic]) -> dict[str, NDArray[Any]]:
    """The tensors of each name one behind the other, flat, in one copy for all."""
    flat = [part.flatten() for of_name in parts.values() for part in of_name]
    whole = torch.cat([x.double() if kind is np.float64 else x for x in flat]).cpu().numpy()
    sizes = [sum(part.numel() for part in of_name) for of_name in parts.values()]
    return dict(zip(parts, np.split(whole, np.cumsum(sizes)[:-1]), strict=True))
