"""How good is a student? Numbers that do not depend on a tokenizer: per byte of text."""

from diglot.evaluation.evaluator import Evaluator
from diglot.evaluation.reports import OnPolicyReport, ReferenceReport

__all__ = ["Evaluator", "OnPolicyReport", "ReferenceReport"]
