"""What an evaluation found: sums per sample, and the ratios and errors that follow from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from diglot.arrays import Floats

Sums = Floats


def ratio(top: Sums, bottom: Sums) -> float:
    """Ratio of totals; NaN when there is nothing below."""
    return float(top.sum() / bottom.sum()) if bottom.sum() else math.nan


def ratio_error(top: Sums, bottom: Sums) -> float:
    """Standard error of `ratio` over samples (linearised): how much another draw of samples would move it."""
    n = len(top)
    if n < 2 or not bottom.sum():
        return math.nan
    residual = top - ratio(top, bottom) * bottom
    return float(math.sqrt(n / (n - 1) * np.square(residual).sum()) / bottom.sum())


@dataclass(frozen=True)
class ReferenceReport:
    """A model on given text. Arrays are per sample, [M]."""

    nats: Sums  # -log p of the text's bytes, stop not included
    num_bytes: Sums
    stop_at_end: Sums = field(default_factory=lambda: np.zeros(0))  # probability of stop where the reply ends
    stop_expected: Sums = field(default_factory=lambda: np.zeros(0))  # sum of the probability of stop over its rows
    ended: Sums = field(default_factory=lambda: np.zeros(0))  # 1 where the reply was read to its end, else 0

    @property
    def bits_per_byte(self) -> float:
        """Cross-entropy of the text in bits per byte: comparable between tokenizers, lower is better."""
        return ratio(self.nats, self.num_bytes) / math.log(2)

    @property
    def bits_per_byte_error(self) -> float:
        """Standard error over samples."""
        return ratio_error(self.nats, self.num_bytes) / math.log(2)


@dataclass(frozen=True)
class OnPolicyReport:
    """A student against a teacher on text that the student wrote. Arrays are per sample, [M]."""

    gap: Sums  # log p_student - log p_teacher of the completion, stop included, exact chunks only, nats
    surprisal: Sums  # -log p_student of the same, nats
    num_bytes: Sums
    stop_common: Sums  # sum over compared rows of min(student's, teacher's stop probability)
    stop_either: Sums  # the same with max
    tokens: Sums
    covered: Sums  # student tokens in exact chunks
    stopped: Sums  # 1 where the completion ended by itself, 0 where it was cut
    completions: Sequence[str] = field(default_factory=list)

    @classmethod
    def of_totals(cls, totals: Mapping[str, float]) -> OnPolicyReport:
        """The report of sums over all samples, as one."""
        sums: dict[str, Any] = {name: np.array([totals[name]]) for name in cls.columns()}
        return cls(**sums)

    @classmethod
    def joined(cls, reports: Sequence[OnPolicyReport]) -> OnPolicyReport:
        """The samples of several reports as one."""
        sums = {name: np.concatenate([getattr(one, name) for one in reports]) for name in cls.columns()}
        return cls(**sums, completions=[text for one in reports for text in one.completions])

    @classmethod
    def columns(cls) -> list[str]:
        """Names of the arrays."""
        return [f.name for f in fields(cls) if f.name != "completions"]

    @property
    def reverse_kl_nats_per_byte(self) -> float:
        """KL(student || teacher) of whole completions, divided by their bytes: Monte Carlo, unbiased up to the
        ratio."""
        return ratio(self.gap, self.num_bytes)

    @property
    def reverse_kl_error(self) -> float:
        """Standard error over samples."""
        return ratio_error(self.gap, self.num_bytes)

    @property
    def surprisal_nats_per_byte(self) -> float:
        """The student's own entropy rate on its samples."""
        return ratio(self.surprisal, self.num_bytes)

    @property
    def stop_agreement(self) -> float:
        """Overlap of both sides' stop probabilities over all rows where both could stop, in [0, 1]; 1 is equal."""
        return ratio(self.stop_common, self.stop_either)

    @property
    def stop_agreement_error(self) -> float:
        """Standard error over samples. Large where a few rows hold nearly all of the probability of stopping."""
        return ratio_error(self.stop_common, self.stop_either)

    @property
    def coverage(self) -> float:
        """Share of the student's tokens that lie in exact chunks, in [0, 1]."""
        return ratio(self.covered, self.tokens)
