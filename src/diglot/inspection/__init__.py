"""What are two models to each other, before anything is trained?"""

from diglot.inspection.facts import Inspection, ModelFacts
from diglot.inspection.inspect import Side, inspect_pair
from diglot.inspection.load import Input
from diglot.inspection.models import inspect_models
from diglot.inspection.spans import Span, align_text, spans_of

__all__ = [
    "Input",
    "Inspection",
    "ModelFacts",
    "Side",
    "Span",
    "align_text",
    "inspect_models",
    "inspect_pair",
    "spans_of",
]
