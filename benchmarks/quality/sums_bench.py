"""Sums in words as a pair: numbers that one side reads whole and the other digit by digit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import sums
import torch
from assets import cache
from tasks import Sums
from toys import STOP

from .bench import Split, one_of
from .declaration import Budget, DeclarationError
from .measures import Measure

DIRECTIONS = ("finer", "coarser")


class SumsBench:
    """`benchmarks/sums.py` in one direction. `sums.NotLearntError` if the teacher does not know the task.

    Args:
        direction: which side reads numbers whole; "finer": the teacher.
        equal: the control: a teacher with the student's tokenizer.
        task: ranges of the numbers, as of `tasks.Sums`.
        sizes: as of `sums.Numbers`: width, layers, steps, student_steps.
    """

    def __init__(
        self,
        budget: Budget,
        folder: Path,
        direction: str = "finer",
        equal: bool = False,
        task: dict[str, Any] | None = None,
        sizes: dict[str, int] | None = None,
    ) -> None:
        one_of("direction", direction, DIRECTIONS)
        ranges = {name: tuple(value) if isinstance(value, list) else value for name, value in (task or {}).items()}
        self.bench = sums.Numbers(direction, Sums(**ranges), models=cache() / "toys", **(sizes or {}))
        self.equal, self.items = equal, budget.items
        self.trainer_options: dict[str, Any] = dict(max_completion_length=sums.LONGEST, max_length=96, adam_beta2=0.98)
        self._teacher: Any = None
        self.teacher_cache = None

    @property
    def tokenizers(self) -> tuple[Any, Any]:
        """The student's and the teacher's."""
        student, teacher = self.bench.tokenizers
        return student, student if self.equal else teacher

    def student(self) -> Any:
        """Writes sentences whose sums are wrong."""
        return self.bench.model(self.bench.direction == "coarser", right=False)

    def teacher(self) -> Any:
        """Has learnt the task, which is checked once."""
        if self._teacher is None:
            self._teacher = self.bench.teacher(control=self.equal)[0]
        return self._teacher

    def prompts(self, seed: int, count: int) -> list[dict[str, Any]]:
        """Of the part of the sums that training may see."""
        return [{"prompt": prompt} for prompt, _ in self.bench.task.rows(100 + seed, count, "train")]

    @lru_cache(maxsize=8)  # noqa: B019 -- benches live as long as their process
    def texts(self, seed: int, count: int) -> list[dict[str, Any]]:
        """Sampled from the teacher; one that did not stop is cut where its length ends."""
        rows, tokenizer = self.prompts(seed, count), self.tokenizers[1]
        torch.manual_seed(seed)
        for start in range(0, count, 256):
            part = rows[start : start + 256]
            written = sums.write(self.teacher(), tokenizer, [row["prompt"] for row in part], sample=True)
            for row, ids in zip(part, written, strict=True):
                row["completion"] = tokenizer.decode(ids, skip_special_tokens=True) or " "
        return rows

    def measure(self, student: Any, split: Split) -> dict[str, Measure]:
        """Greedy answers, right texts, and samples of the student that the teacher reads."""
        (own, other), teacher = self.tokenizers, self.teacher()  # which learns if it has to: not without gradients
        prompts = [prompt for prompt, _ in self._held(split)]
        torch.manual_seed(7)
        written = sums.write(student.eval(), own, prompts, sample=True)
        texts = [own.decode(ids, skip_special_tokens=True) for ids in written]
        stops = [ids[-1:] == [STOP] for ids in written]
        read = [sums.ids_of(other, text) + [STOP] * stop for text, stop in zip(texts, stops, strict=True)]
        with torch.no_grad():
            of_student, of_teacher = (
                sums.written_log_probs(model, [sums.ids_of(tokenizer, prompt) for prompt in prompts], rest).double()
                for model, tokenizer, rest in ((student, own, written), (teacher, other, read))
            )
        size = [len(text.encode()) for text in texts]
        return {
            "reverse_kl": Measure.of((of_student - of_teacher).numpy(), size, "nats per byte"),
            "length": Measure.of(size, 1.0, "bytes"),
            "stopped": Measure.of(np.array(stops, dtype=float), 1.0, "share"),
            **self._read(student, own, split),
        }

    def measure_teacher(self, split: Split) -> dict[str, Measure]:
        """Greedy answers and right texts."""
        return self._read(self.teacher(), self.tokenizers[1], split)

    def _read(self, model: Any, tokenizer: Any, split: Split) -> dict[str, Measure]:
        rows = self._held(split)
        written = sums.write(model, tokenizer, [prompt for prompt, _ in rows], sample=False)
        right = [
            float(tokenizer.decode(ids, skip_special_tokens=True) == text)
            for ids, (_, text) in zip(written, rows, strict=True)
        ]
        bits, digits, digit_bytes = _bits(model, tokenizer, rows)
        return {
            "accuracy": Measure.of(right, 1.0, "share"),
            "bits_per_byte": Measure.of(bits, [len(text.encode()) for _, text in rows], "bits per byte"),
            "digits_bits_per_byte": Measure.of(digits, digit_bytes, "bits per byte"),
        }

    @lru_cache(maxsize=2)  # noqa: B019 -- benches live as long as their process
    def _held(self, split: Split) -> list[tuple[str, str]]:
        """Every other held-out row, so that no row is in both splits."""
        rows = sorted(set(self.bench.task.rows(7, 4000, "held")))[split == "test" :: 2]
        if len(rows) < self.items:
            raise DeclarationError(f"the task has {len(rows)} held-out rows in the {split} split, not {self.items}.")
        return rows[:: len(rows) // self.items][: self.items]


def _bits(model: Any, tokenizer: Any, rows: Sequence[tuple[str, str]]) -> tuple[Any, Any, Any]:
    """Of each right text: bits of its tokens and stop, bits of the tokens with a digit, and bytes of those."""
    read = [(sums.ids_of(tokenizer, prompt), [*sums.ids_of(tokenizer, text), STOP]) for prompt, text in rows]
    with torch.no_grad():
        ids, mask = sums.padded([prompt + rest for prompt, rest in read])
        every = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        chosen = -every.gather(-1, ids[:, 1:, None])[..., 0].double().numpy() / math.log(2)
    digits = [any(c.isdigit() for c in piece) for piece in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    has_digit, out = np.array(digits), []
    for row, (prompt, rest) in zip(chosen, read, strict=True):
        bits, which = row[len(prompt) - 1 : len(prompt) + len(rest) - 1], has_digit[rest]
        size = sum(len(tokenizer.convert_ids_to_tokens(i)) for i in np.array(rest)[which].tolist())
        out.append((bits.sum(), bits[which].sum(), size))
    return tuple(np.array(column) for column in zip(*out, strict=True))
