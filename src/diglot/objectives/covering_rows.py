"""What is read of the teacher's rows, part by part, before they are gone.

Shapes: `r` rows of a pass, `q` single tokens, `Q` pairs of a row and a boundary that its tokens run past, `L` tokens of
their ranges, `K` likeliest tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diglot.batches.sending import sent_together
from diglot.objectives.covering_plan import EarlierRows

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
NEGLIGIBLE = 1e-4  # of the mass of a range: a token that is not looked at by itself
_RUN = 128  # columns side by side, of which the largest is sought first
_TOGETHER = 2**21  # tokens of ranges, 24 bytes each, that are looked through at a time


@dataclass(frozen=True)
class Table:
    """What rows are read by."""

    stop_ids: Tensor
    silent_ids: Tensor  # of no text, and no stop
    sorted_ids: Tensor  # [V_t] of the teacher's trie
    top_k: int

    def to(self, device: torch.device | str) -> Table:
        """The same with its tensors on `device`."""
        stop, silent, order = (x.to(device) for x in (self.stop_ids, self.silent_ids, self.sorted_ids))
        return Table(stop, silent, order, self.top_k)


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


NONE = np.zeros(0, dtype=np.int64)
NO_PAIRS = EarlierRows(*(NONE,) * 7, np.zeros(0, dtype=np.bool_))


@torch.no_grad()
def read_rows(
    parts: Iterable[tuple[slice, Tensor]], row: Ints, token: Ints, pairs: EarlierRows, first: int, table: Table
) -> RowsRead:
    """One pass over log-probs `[r, V_t]`, part by part; they are overwritten.

    Args:
        row, token: `[q]`, which single tokens of which rows are read; rows are numbered from `first`.
        pairs: whose ranges are read.
    """
    row, pair_row = row - first, pairs.row - first
    order, by_row = np.argsort(row, kind="stable"), np.argsort(pair_row, kind="stable")
    sorted_row, sorted_pair = row[order], pair_row[by_row]
    numbers: dict[str, list[Tensor]] = {name: [] for name in ("stop", "silent", "top", "single")}
    top_ids: list[Tensor] = []
    ranges = _Ranges(pairs, pair_row, table)
    for at, logp in parts:
        device, rows = logp.device, [at.start, at.start + len(logp)]
        stop, silent = table.stop_ids.to(device), table.silent_ids.to(device)
        numbers["stop"].append(logp[:, stop].logsumexp(-1))
        numbers["silent"].append(logp[:, silent].logsumexp(-1))
        here = order[slice(*np.searchsorted(sorted_row, rows))]
        index = [torch.from_numpy(x) for x in (row[here] - at.start, token[here])]
        at_row, at_token = sent_together(index, device)
        numbers["single"].append(logp[at_row, at_token])
        ranges.read(logp, at.start, by_row[slice(*np.searchsorted(sorted_pair, rows))])
        for without_text in (stop, silent):
            logp.index_fill_(1, without_text, -torch.inf)
        values, ids = _likeliest(logp, min(table.top_k, logp.shape[1]))
        numbers["top"].append(values)
        top_ids.append(ids)
    ranges.look_through()
    number, whole = _to_host(
        {**numbers, "total": ranges.totals, "leaf": ranges.values},
        {"top_ids": top_ids, "leaf_at": ranges.places, "leaf_id": ranges.ids},
    )
    single, total = np.zeros(len(row)), np.full(len(pair_row), -np.inf)
    single[order], total[by_row] = number["single"], number["total"]
    count = len(number["stop"])
    shape = count, len(whole["top_ids"]) // max(count, 1)  # a rank may have nothing to read
    owner = np.concatenate([np.zeros(0, dtype=np.int64), *ranges.owners])
    return RowsRead(
        single,
        number["stop"],
        number["silent"],
        whole["top_ids"].reshape(shape),
        number["top"].reshape(shape),
        owner[whole["leaf_at"]],
        whole["leaf_id"],
        number["leaf"],
        total,
    )


def _likeliest(logp: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row `[r, V]`, and their ids: `[r, count]`, sorted.

    On a CPU the columns are sought in the runs of columns with the largest maxima, which hold them all: less than half
    the time.
    """
    runs = logp.shape[1] // _RUN
    if logp.device.type != "cpu" or runs <= count:
        values, ids = logp.topk(count, dim=-1)
        return values, ids
    whole, rest = logp[:, : runs * _RUN].unflatten(1, (runs, _RUN)), logp[:, runs * _RUN :]
    chosen = whole.amax(-1).topk(count, dim=-1).indices
    at = chosen[:, :, None].expand(-1, -1, _RUN)
    values, place = torch.cat([whole.gather(1, at).flatten(1), rest], dim=1).topk(count, dim=-1)
    columns = (chosen[:, :, None] * _RUN + torch.arange(_RUN)).flatten(1)
    behind = torch.arange(runs * _RUN, logp.shape[1]).expand(len(logp), -1)
    return values, torch.cat([columns, behind], dim=1).gather(1, place)


class _Ranges:
    """The tokens of ranges of sorted tokens: their mass together, and those by themselves that hold some of it.

    Which these are says the device, and the host waits for it. So they are looked through many at a time.
    """

    def __init__(self, pairs: EarlierRows, pair_row: Ints, table: Table) -> None:
        self.pairs, self.pair_row, self.table = pairs, pair_row, table
        self.totals: list[Tensor] = []  # logarithms of masses
        self.values: list[Tensor] = []  # of single tokens
        self.ids: list[Tensor] = []
        self.places: list[Tensor] = []  # among all tokens of all ranges
        self.owners: list[Ints] = []  # the pair of each of those
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []  # log-probs, the least that counts, ids
        self._looked, self._size = 0, 0  # how many tokens were looked through, and wait to be

    def read(self, logp: Tensor, first: int, pair: Ints) -> None:
        """The ranges of some pairs, whose rows are those of `logp`, numbered from `first`."""
        if not len(pair):
            return
        low, length = self.pairs.low[pair], (self.pairs.high - self.pairs.low)[pair]
        owner = np.repeat(np.arange(len(pair)), length)
        place = np.arange(len(owner)) - np.repeat(np.cumsum(length) - length - low, length)
        host = owner, place, self.pair_row[pair][owner] - first, length
        at_owner, at_place, at_row, lengths = sent_together([torch.from_numpy(x) for x in host], logp.device)
        ids = self.table.sorted_ids.to(logp.device)[at_place]
        value = logp[at_row, ids].double()
        # Ranges lie side by side: no sum or maximum depends on an order that could change.
        most = torch.segment_reduce(value, "max", lengths=lengths, unsafe=True)
        sums = torch.segment_reduce((value - most[at_owner]).exp(), "sum", lengths=lengths, unsafe=True)
        self.totals.append(most + sums.log())
        self._waiting.append((value, most[at_owner] + math.log(NEGLIGIBLE), ids))
        self.owners.append(pair[owner])
        self._size += len(owner)
        if self._size > _TOGETHER:
            self.look_through()

    def look_through(self) -> None:
        """Keep what holds some mass of those that wait."""
        if not self._waiting:
            return
        value, least, ids = map(torch.cat, zip(*self._waiting, strict=True))
        heavy = (value > least).nonzero()[:, 0]
        self.values.append(value[heavy])
        self.ids.append(ids[heavy])
        self.places.append(heavy + self._looked)
        self._looked, self._size, self._waiting = self._looked + self._size, 0, []


def _to_host(
    numbers: dict[str, list[Tensor]], whole: dict[str, list[Tensor]]
) -> tuple[dict[str, Floats], dict[str, Ints]]:
    """The tensors of each name one behind the other, flat: numbers and whole numbers, in one copy for all."""
    flat = [part.flatten().double() for of_name in numbers.values() for part in of_name]
    bits = [part.flatten().view(torch.float64) for of_name in whole.values() for part in of_name]  # int64 as it is
    host = torch.cat([*flat, *bits]).cpu().numpy()
    sizes = [sum(part.numel() for part in of_name) for of_name in (*numbers.values(), *whole.values())]
    parts = np.split(host, np.cumsum(sizes)[:-1])
    whole_parts = [part.view(np.int64) for part in parts[len(numbers) :]]
    return dict(zip(numbers, parts, strict=False)), dict(zip(whole, whole_parts, strict=True))
