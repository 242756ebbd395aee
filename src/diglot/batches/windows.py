"""The order of the data when one set of completions serves several optimizer steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from datasets import IterableDataset
from torch.utils.data import Sampler


class RepeatedWindows(Sampler[int]):
    """Indices, shuffled or in order, in windows of `window`, each window `repeats` times in a row.

    The last window of an epoch is filled up from the epoch's beginning, so that every row is seen and no window is
    short. The order depends on seed and epoch only.
    """

    def __init__(self, length: int, window: int, repeats: int, seed: int, *, shuffled: bool = True) -> None:
        self.length, self.window, self.repeats, self.seed, self.shuffled = length, window, repeats, seed, shuffled
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration has."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.length // self.window) * self.window * self.repeats

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        shuffled = torch.randperm(self.length, generator=generator).tolist()
        order = shuffled if self.shuffled else list(range(self.length))
        windows = -(-self.length // self.window)
        order = (order * (1 + self.window // self.length + 1))[: windows * self.window]
        for start in range(0, len(order), self.window):
            for _ in range(self.repeats):
                yield from order[start : start + self.window]


def repeated_stream(rows: IterableDataset, window: int, repeats: int) -> IterableDataset:
    """Streamed rows in windows of `window`, each `repeats` times in a row; a last window that is not whole is left
    out."""
    return rows.map(_repeated, batched=True, batch_size=window, drop_last_batch=True, fn_kwargs={"repeats": repeats})


def _repeated(columns: dict[str, list[Any]], repeats: int) -> dict[str, list[Any]]:
    return {name: values * repeats for name, values in columns.items()}
