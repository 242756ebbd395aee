"""Which objective `auto` stands for, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diglot.comparisons.comparison import Comparison, View
from diglot.comparisons.scores import ModelScores
from diglot.objectives import Level, Objective, make_objective

ACROSS = "covering"


@dataclass(frozen=True)
class Choice:
    """An objective, and in half a sentence why it was taken."""

    name: str
    reason: str


def auto_objective(comparison: Comparison) -> Choice:
    """The objective that `auto` stands for with this teacher."""
    level, same, name = comparison.teacher.level, comparison.reader.same_vocabulary, comparison.teacher.name
    if level < Level.TOP_K:
        return Choice("span", f"{name} gives no more than log-probs of the text")
    if level < Level.HIDDEN and not same:
        return Choice(
            "span", f"{name} gives no whole rows, and its likeliest ids are for rows that both sides cut alike"
        )
    if level < Level.HIDDEN:
        return Choice("top_k", f"{name} gives its likeliest ids and no whole rows")
    if same:
        return Choice("jsd", "both sides have one table of ids, so whole distributions are compared")
    shared = len(comparison.pair.shared_s)
    return Choice(ACROSS, f"the vocabularies differ, {shared:,} tokens are shared, and the teacher gives whole rows")


def single_step(comparison: Comparison) -> Objective:
    """The single-step part of a reverse KL over texts. Its targets depend on the past alone."""
    if comparison.reader.same_vocabulary:
        return make_objective("jsd", comparison.pair, beta=1.0)
    return make_objective(ACROSS, comparison.pair, beta=1.0, written_apart=False)


def explained_by(view: View, scores: ModelScores) -> Tensor | None:
    """What the single steps among a view's terms say of each token, nats, `[N_s]`; see `Objective.explained`."""
    steps = [term for term in view.comparison.terms if term.objective.is_single_step]
    explained = [term.weight * term.objective.explained(view.plans[term.name], scores) for term in steps]
    if not explained:
        return None
    of_terms = torch.stack(explained)  # what one says nothing of another may explain
    return of_terms.nansum(0).masked_fill(of_terms.isnan().all(0), torch.nan)
