"""What is measured of a student: sums per held-out item, so that their ratio has an interval.

A measure of one cell is a pair of lists over items, `top` and `bottom`; its value is the ratio of their totals. Cells
of one pair list the same items in the same order, which is what makes differences paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Kind:
    """What a measure is: its title, and which way is better."""

    title: str
    better: Literal["lower", "higher", None]


KINDS = {
    "reverse_kl": Kind("reverse KL", "lower"),
    "bits_per_byte": Kind("bits per byte", "lower"),
    "digits_bits_per_byte": Kind("bits per byte, digits", "lower"),
    "accuracy": Kind("accuracy", "higher"),
    "length": Kind("length, bytes", None),
    "stopped": Kind("stop rate", None),
}


@dataclass(frozen=True)
class Measure:
    """Sums over items, `[M]` each; `unit` is of their ratio."""

    top: Sequence[float]
    bottom: Sequence[float]
    unit: str

    @classmethod
    def of(cls, top: Any, bottom: Any, unit: str) -> Measure:
        """From arrays; `bottom` may be one number for all items. `ValueError` if the lengths differ."""
        above = np.asarray(top, dtype=np.float64)
        below = np.broadcast_to(np.asarray(bottom, dtype=np.float64), above.shape)
        return cls(above.tolist(), below.tolist(), unit)

    @property
    def value(self) -> float:
        """The ratio of totals; NaN if there is nothing below."""
        below = sum(self.bottom)
        return sum(self.top) / below if below else float("nan")

    def as_json(self) -> dict[str, Any]:
        """With the value beside the sums, for people who open the file."""
        return {"value": self.value, "unit": self.unit, "top": list(self.top), "bottom": list(self.bottom)}


def as_json(measures: dict[str, Measure]) -> dict[str, Any]:
    """Measures of a cell by name. `ValueError` for a name that `KINDS` does not have."""
    if unknown := measures.keys() - KINDS.keys():
        raise ValueError(f"no such measure: {', '.join(sorted(unknown))}; known are {', '.join(KINDS)}")
    return {name: measure.as_json() for name, measure in measures.items()}
