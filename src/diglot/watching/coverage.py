"""How much of a window's text could be aligned, with which teacher; too little of it stops the run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from diglot.batches import text_sums
from diglot.comparisons import Batch
from diglot.errors import AlignmentError
from diglot.watching.metrics import StepMetrics


def watch_coverage(
    batches: Sequence[Batch], dropped: int, metrics: StepMetrics, *, step: int, min_coverage: float
) -> None:
    """Log the alignment of a window. `dropped`: samples that a reader left out, over all comparisons.

    Raises:
        AlignmentError: too little of the student's text could be aligned with one of the teachers' readings.
    """
    totals: dict[str, float] = defaultdict(float)
    totals |= {"dropped_samples": dropped, "windows": 1.0, "on_policy": float(batches[0].on_policy)}
    for batch in batches:
        for name, value in text_sums(batch.pairs).items():
            totals[name] += value
        totals["scored"] += batch.scored
    labels = [view.comparison.label for view in batches[0].views]
    shares = []
    for k, label in enumerate(labels):
        own: dict[str, float] = defaultdict(float)
        for view in (batch.views[k] for batch in batches):
            for name, value in view.read.stats.items():
                own[name] += value
            own["tokens"] += view.missing
        for name, value in own.items():
            totals[name] += value
        if len(labels) > 1:
            metrics.add_mean(f"align/coverage/{label}", own["covered"], own["tokens"])
        shares.append(own["covered"] / own["tokens"] if own["tokens"] else 1.0)
    metrics.add(totals)
    worst = min(range(len(labels)), key=shares.__getitem__)
    if shares[worst] < min_coverage:
        whose = f"those of teacher {labels[worst]!r}" if len(labels) > 1 else "the teacher's"
        raise AlignmentError(
            f"Only {shares[worst]:.1%} of the student's scored tokens could be aligned with {whose} in step {step}: a "
            f"coverage below min_coverage, which is {min_coverage:.0%}. Look at the pair's tokenizers: a lossy "
            "normaliser on one side, or text that the teacher's context cannot hold, are the usual reasons."
        )
