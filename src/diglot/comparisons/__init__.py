"""What is compared with whom, and what objectives may pull from it: comparisons, batches and their views, scores."""

from diglot.comparisons.comparison import Answers, Batch, Comparison, Read, Texts, View, make_batch
from diglot.comparisons.scores import ModelScores, Side, scores_of
from diglot.comparisons.terms import Entry, Term, check_level, check_options, defaults_of, entries_of, terms_of

__all__ = [
    "Answers",
    "Batch",
    "Comparison",
    "Entry",
    "ModelScores",
    "Read",
    "Side",
    "Term",
    "Texts",
    "View",
    "check_level",
    "check_options",
    "defaults_of",
    "entries_of",
    "make_batch",
    "scores_of",
    "terms_of",
]
