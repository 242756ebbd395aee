"""Over what each term of a window's loss is averaged, and how much each comparison weighs in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from diglot.comparisons.comparison import Batch, View

Reduce = Callable[[Mapping[str, float]], dict[str, float]]


def set_counts(
    batches: Sequence[Batch], items: Callable[[View], Mapping[str, float]], reduce: Reduce, routed: bool = False
) -> None:
    """Give each view the items of its terms in the window, and its weight.

    Where rows are routed every item counts alike, whichever teacher it belongs to, so terms of one name have one count.
    Comparisons whose terms differ weigh as much as the scored tokens that they read.

    Args:
        items: of each term in one view.
        reduce: sums over all ranks.
    """
    own: dict[str, float] = {}
    for batch in batches:
        for k, view in enumerate(batch.views):
            for name, count in {**items(view), "": view.read.stats["tokens"]}.items():
                own[f"{k}/{name}"] = own.get(f"{k}/{name}", 0.0) + float(count)
    totals = reduce(own)
    names = [[term.name for term in view.comparison.terms] for view in batches[0].views]
    alike = all(one == names[0] for one in names)
    tokens = sum(totals[f"{k}/"] for k in range(len(names)))
    for batch in batches:
        for k, view in enumerate(batch.views):
            counts, weight = {name: totals[f"{k}/{name}"] for name in names[k]}, view.comparison.weight
            if routed and alike:
                weight = 1.0
                counts = {name: sum(totals[f"{j}/{name}"] for j in range(len(names))) for name in names[k]}
            elif routed:
                weight = totals[f"{k}/"] / max(tokens, 1.0)
            batch.views[k] = replace(view, weight=weight, counts=counts)
