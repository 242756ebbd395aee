"""How the student's own texts change from step to step: a run that destroys what both sides cut differently shows here.

The history holds an entry for every step whose texts the student wrote, of this process's texts: logs may come too
rarely for a fault that takes twenty steps. Steps of little text are put together: shares of ten tokens are noise.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Mapping, Sequence

from diglot.comparisons import Batch
from diglot.data import Sample
from diglot.inspection.texts import TEXTS
from diglot.rendering import Conversation

FIRST, LAST = 3, 20  # entries that are kept of the beginning, and up to now
FIXED_TEXTS = 8
EVERY, EARLY = 5, 20  # the fixed texts are scored at every fifth of the first twenty steps, then where a step is logged
CHARACTERS = 400  # of each
ENOUGH_TOKENS, ENOUGH_RUNS = 256, 20  # in an entry, for shares; runs of digits in it, for their length

_DIGITS = re.compile(r"[0-9]+")

Entry = dict[str, float]


def text_sums_of(batches: Sequence[Batch]) -> dict[str, float]:
    """Sums over what the student wrote: `digits`, and `digit_runs` that they stand in."""
    texts = [p.student.segment_bytes[-1].decode("utf-8", "replace") for b in batches for p in b.pairs]
    runs = [match.group() for text in texts for match in _DIGITS.finditer(text)]
    return {"digits": float(sum(map(len, runs))), "digit_runs": float(len(runs))}


class Drift:
    """The first entries and the last ones; between them a trend is seen whether it is fast or slow."""

    def __init__(self) -> None:
        self._first: list[Entry] = []
        self._last: deque[Entry] = deque(maxlen=LAST)
        self._sums: Counter[str] = Counter()
        self._bits: float | None = None

    @property
    def history(self) -> list[Entry]:
        """One entry a step, oldest first, with the names of the log."""
        return [*self._first, *self._last]

    def add(self, step: int, sums: Mapping[str, float], bits_per_byte: float | None) -> None:
        """Note a step, from sums over its texts: `scored` tokens in `bytes`, `digits` in `digit_runs`; and over those
        that one teacher reads: `one_to_one` of `tokens`."""
        self._sums.update(sums)
        self._bits = self._bits if bits_per_byte is None else bits_per_byte
        totals = self._sums
        if totals["tokens"] < ENOUGH_TOKENS or not totals["bytes"]:
            return
        entry: Entry = {
            "step": float(step),
            "align/one_to_one": totals["one_to_one"] / totals["tokens"],
            "completions/tokens_per_byte": totals["scored"] / totals["bytes"],
        }
        if totals["digit_runs"] >= ENOUGH_RUNS:
            entry["completions/digit_run"] = totals["digits"] / totals["digit_runs"]
        if self._bits is not None:
            entry["watched/bits_per_byte"] = self._bits
        (self._first if len(self._first) < FIRST else self._last).append(entry)
        self._sums, self._bits = Counter(), None


def is_due(step: int, logged: bool) -> bool:
    """Are the fixed texts scored at this step?"""
    return logged or (step <= EARLY and step % EVERY == 0)


def fixed_texts(samples: Sequence[Sample]) -> list[Sample]:
    """Texts of the data that nobody trains towards here, or, where rows have none, texts of the package."""
    own = [sample for sample in samples if sample.reply]
    if own:
        return own[:FIXED_TEXTS]
    return [Sample(Conversation(None, "\n"), text[:CHARACTERS], "built-in text") for text in TEXTS[-FIXED_TEXTS:]]
