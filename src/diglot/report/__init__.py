"""What a person looks at: tables in the terminal, the model card."""

from diglot.report.card import model_card
from diglot.report.completions import CompletionRow, print_completions
from diglot.report.tables import before_after_table

__all__ = ["CompletionRow", "before_after_table", "model_card", "print_completions"]
