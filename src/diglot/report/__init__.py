"""What a person looks at: tables in the terminal, records of a run, warnings, the model card, a page about a run."""

from diglot.report.advice import Advice, advise, all_advice
from diglot.report.card import CardFacts, TeacherFacts, model_card
from diglot.report.completions import CompletionRow, print_completions

__all__ = [
    "Advice",
    "CardFacts",
    "CompletionRow",
    "TeacherFacts",
    "advise",
    "all_advice",
    "model_card",
    "print_completions",
]
