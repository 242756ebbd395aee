"""The laboratory of exact distributions as a pair: no sampling noise, items are its four prompts."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import toys
from assets import cache
from laboratory import PAIRS, STARTS, Laboratory

from .bench import Split, one_of
from .declaration import Budget, DeclarationError
from .measures import Measure


class LaboratoryBench:
    """One pair of `benchmarks/laboratory.py`. Both splits are the same: all texts are counted.

    Args:
        pair: which tokenizers.
        start: what the student knows: another distribution, or the teacher's.
        fit_steps: of the models, before anything is distilled.
    """

    def __init__(
        self, budget: Budget, folder: Path, pair: str = "finer", start: str = "other", fit_steps: int = 600
    ) -> None:
        one_of("pair", pair, PAIRS)
        one_of("start", start, STARTS)
        self.lab = Laboratory(pair, fit_steps=fit_steps, models=cache() / "toys")
        if budget.items != len(self.lab.texts.prompts):
            raise DeclarationError(f"the laboratory has {len(self.lab.texts.prompts)} items, not {budget.items}.")
        self.start = start
        self.teacher_cache = None
        self.strings = self.lab.texts.strings
        self.size = np.array([len(text) for text in self.strings], dtype=np.float64)
        length = self.lab.texts.length
        self.trainer_options: dict[str, Any] = dict(max_completion_length=length + 2, max_length=32)

    @property
    def tokenizers(self) -> tuple[Any, Any]:
        """The student's and the teacher's."""
        return self.lab.tokenizers

    def student(self) -> Any:
        """Fitted once, read anew."""
        return self.lab.student(self.start)[0]

    def teacher(self) -> Any:
        """Fitted once."""
        return self.lab.teacher[0]

    def prompts(self, seed: int, count: int) -> list[dict[str, Any]]:
        """The prompts in turn: training shuffles them."""
        prompts = self.lab.texts.prompts
        return [{"prompt": prompts[i % len(prompts)]} for i in range(count)]

    @lru_cache(maxsize=8)  # noqa: B019 -- benches live as long as their process
    def texts(self, seed: int, count: int) -> list[dict[str, Any]]:
        """Drawn from the teacher's exact distribution, empty texts left out: some trainers have no row for them."""
        draw, rows = np.random.default_rng(seed), self.prompts(seed, count)
        known = self.lab.teacher[1][:, 1:-1]  # without the empty text, and without what is longer
        which = {prompt: i for i, prompt in enumerate(self.lab.texts.prompts)}
        for row in rows:
            mass = known[which[row["prompt"]]]
            row["completion"] = self.strings[1 + draw.choice(len(mass), p=mass / mass.sum())]
        return rows

    def measure(self, student: Any, split: Split) -> dict[str, Measure]:
        """Sums over all texts."""
        own, teacher = self.lab.reader.distribution(student.eval())[0], self.lab.teacher[1]
        kl = np.where(own > 0, own * (np.log(np.maximum(own, 1e-300)) - np.log(np.maximum(teacher, 1e-300))), 0).sum(-1)
        inside = own[:, :-1]
        return {
            "reverse_kl": Measure.of(kl, 1.0, "nats per text"),
            "length": Measure.of(inside @ self.size, inside.sum(-1), "bytes"),
            "stopped": Measure.of(inside.sum(-1), 1.0, "share"),
            **self._bits(self.lab.reader, student),
        }

    def measure_teacher(self, split: Split) -> dict[str, Measure]:
        """Bits per byte of its own texts: their entropy, and its noncanonical mass."""
        return self._bits(toys.Reader(self.tokenizers[1], self.lab.texts), self.teacher())

    def _bits(self, reader: toys.Reader, model: Any) -> dict[str, Measure]:
        """Of the canonical tokens of the teacher's texts."""
        wanted = self.lab.teacher[1][:, :-1]
        with torch.no_grad():
            log_probs = reader.canonical_log_probs(model, np.arange(len(self.strings))).double().numpy()
        bits = -(wanted * log_probs).sum(-1) / math.log(2)
        return {"bits_per_byte": Measure.of(bits, wanted @ self.size, "bits per byte")}
