"""Which samples share a micro-batch: those of similar length, so that little of a pass is padding.

The loss of a window does not depend on how its samples are split (the trainer asks whether a term's does), so the split
is free. A micro-batch is as wide as its
longest sample, before and after: no pass gets larger than the largest one was.
"""

from __future__ import annotations

from collections.abc import Sequence

from diglot.batches.reading import ReadPair

Placed = tuple[int, ReadPair | None]


def by_length(window: Sequence[Sequence[ReadPair | None]], together: int = 1) -> list[list[Placed]]:
    """The window's pairs, the shortest first, in micro-batches of the same sizes, each with its place in the window.

    Runs of `together` pairs (completions of one prompt) stay together, so that their prompt need be read once only.
    What was dropped stays where it is: a micro-batch keeps the number of samples that it had. A window of a single
    micro-batch has nothing to gain and stays as it is, to the bit.
    """
    if len(window) == 1:
        return as_read(window)
    placed = list(enumerate(pair for batch in window for pair in batch))
    runs = [placed[i : i + together] for i in range(0, len(placed), together)]
    whole = [run for run in runs if all(pair is not None for _, pair in run)]
    ordered = iter(sorted((r for r in whole if len(r) == together), key=_longest))
    movable = {run[0][0] for run in whole if len(run) == together}
    moved = iter([one for run in runs for one in (next(ordered) if run[0][0] in movable else run)])
    return [[next(moved) for _ in batch] for batch in window]


def as_read(window: Sequence[Sequence[ReadPair | None]]) -> list[list[Placed]]:
    """The same in the order of the data."""
    placed = iter(list(enumerate(pair for batch in window for pair in batch)))
    return [[next(placed) for _ in batch] for batch in window]


def _longest(run: Sequence[Placed]) -> tuple[int, int]:
    """The student is the one that is trained, so its length counts first."""
    pairs = [pair for _, pair in run if pair is not None]
    return max(len(p.student.ids) for p in pairs), max(len(p.teacher.ids) for p in pairs)
