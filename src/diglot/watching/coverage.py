"""How much of what was written in a window could be aligned, with which teacher; too little of it stops the run."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence

from diglot.batches import text_sums
from diglot.comparisons import Batch
from diglot.errors import AlignmentError
from diglot.watching.metrics import StepMetrics

logger = logging.getLogger(__name__)


def watch_coverage(
    batches: Sequence[Batch], dropped: int, metrics: StepMetrics, *, step: int, min_coverage: float
) -> None:
    """Log the alignment of a window. `dropped`: samples that a reader left out, over all comparisons.

    Raises:
        AlignmentError: too little of what was written could be aligned with one of the teachers' readings.
    """
    totals: dict[str, float] = defaultdict(float)
    totals |= {"dropped_samples": dropped, "windows": 1.0, "on_policy": float(batches[0].on_policy)}
    for batch in batches:
        for name, value in text_sums(batch.pairs, batch.on_policy).items():
            totals[name] += value
        totals["scored"] += batch.scored
    labels = [view.comparison.label for view in batches[0].views]
    sums = [_sums(batches, k) for k in range(len(labels))]
    for label, own in zip(labels, sums, strict=True):
        for name, value in own.items():
            totals[name] += value if name not in _OF_WRITTEN else 0.0
        if len(labels) > 1:
            metrics.add_mean(f"align/coverage/{label}", own["covered"], own["tokens"])
    metrics.add(totals)
    if totals["written"] and not totals["scored"]:
        logger.warning("Step %d: none of the %d tokens that were written is scored.", step, totals["written"])
    elif totals["scored"] and not any(count for view in batches[0].views for count in view.counts.values()):
        names = dict.fromkeys(term.name for view in batches[0].views for term in view.comparison.terms)
        logger.warning(
            "Step %d: %s finds nothing to compare in the %d tokens that are scored, and the loss is 0. An objective of "
            "one-to-one rows compares tokens that both sides cut alike; covering compares all.",
            step,
            ", ".join(names),
            totals["scored"],
        )
    shares = [_share(own) for own in sums]
    worst = min(range(len(labels)), key=shares.__getitem__)
    if shares[worst] < min_coverage:
        whose = f"those of teacher {labels[worst]!r}" if len(labels) > 1 else "the teacher's"
        tokens = _comparable(sums[worst]) or sums[worst]["written"]
        raise AlignmentError(
            f"Only {shares[worst]:.1%} of the {int(tokens)} tokens that were written in step {step} "
            f"could be aligned with {whose} ({int(sums[worst]['tokens'])} are scored): a coverage below min_coverage, "
            f"which is {min_coverage:.0%}. Look at the pair: a lossy normaliser on one side, text that the teacher's "
            "context cannot hold, or replies made of control tokens are the usual reasons."
        )


_OF_WRITTEN = ("written", "excluded", "unscored")  # sums of a view that the share alone reads


def _sums(batches: Sequence[Batch], k: int) -> dict[str, float]:
    """What one comparison's views of the batches count, texts that it could not read included."""
    own: dict[str, float] = defaultdict(float)
    for view in (batch.views[k] for batch in batches):
        for name, value in view.read.stats.items():
            own[name] += value
        for name in ("tokens", "written"):
            own[name] += view.missing
    return own


def _comparable(own: Mapping[str, float]) -> float:
    """Tokens that were written and that the user wants compared: neither markup of the writer's own template, nor of a
    role that is not to be scored."""
    return max(own["written"] - own["excluded"], own["tokens"])


def _share(own: Mapping[str, float]) -> float:
    """How many of them were aligned; 0 where there are none, unless it is the user who left out what was written."""
    if comparable := _comparable(own):
        return own["covered"] / comparable
    return 0.0 if own["written"] and not own["unscored"] else 1.0
