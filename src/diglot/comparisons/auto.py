"""Which objective `auto` stands for, and why."""

from __future__ import annotations

from dataclasses import dataclass

from diglot.comparisons.comparison import Comparison
from diglot.objectives import Level

ACROSS = "covering"


@dataclass(frozen=True)
class Choice:
    """An objective, and in half a sentence why it was taken."""

    name: str
    reason: str


def auto_objective(comparison: Comparison) -> Choice:
    """The objective that `auto` stands for with this teacher."""
    level = comparison.teacher.level
    if level < Level.TOP_K:
        return Choice("alm", f"{comparison.teacher.name} gives no more than log-probs of the text")
    if level < Level.HIDDEN:
        return Choice("top_k", f"{comparison.teacher.name} gives its likeliest ids and no whole rows")
    if comparison.reader.same_vocabulary:
        return Choice("jsd", "both sides have one table of ids, so whole distributions are compared")
    shared = len(comparison.pair.shared_s)
    return Choice(ACROSS, f"the vocabularies differ, {shared:,} tokens are shared, and the teacher gives whole rows")
