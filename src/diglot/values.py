"""Of which kind is an option's value?"""

from __future__ import annotations

import math
import os
from numbers import Integral, Real
from typing import Any

from diglot.errors import ConfigError

_RULES = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a finite number",
    "str": "text",
    "None": "none",
}


def check_kind(name: str, value: object, annotation: Any) -> None:
    """Raise `ConfigError` unless a value is what its option is annotated with: `bool`, `int`, `float`, `str`, `None`.

    A text "no" would count as true, a NaN passes comparisons, and a text is no number: each would be found late or not
    at all. An annotation with other types says nothing.
    """
    kinds = (annotation.__name__ if isinstance(annotation, type) else str(annotation)).replace(" ", "").split("|")
    if not set(kinds) <= _RULES.keys() or any(_is(value, kind) for kind in kinds):
        return
    rule = " or ".join(_RULES[kind] for kind in kinds)
    hint = ""
    if isinstance(value, str) and "e" in value.lower() and "float" in kinds and _is_number(value):
        hint = " YAML reads 1e-4 as text: write 1.0e-4."
    raise ConfigError(f"{name}={value!r} is not allowed: it must be {rule}.{hint}")


def _is(value: object, kind: str) -> bool:
    if kind == "None":
        return value is None
    if kind == "bool" or isinstance(value, bool):
        return kind == "bool" and isinstance(value, bool)
    if kind == "str":
        return isinstance(value, (str, os.PathLike))
    if kind == "int":
        return isinstance(value, Integral)
    return isinstance(value, Real) and math.isfinite(value)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
