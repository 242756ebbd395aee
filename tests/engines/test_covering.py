"""What a teacher's named tokens say about the student's next one, against a teacher whose distribution is known.

The teacher writes one of all texts of up to five letters with a known probability, always in its own tokens, so what a
student with the same distribution over texts expects next, in its own tokens, is a sum over texts. The teacher's rows
are those of the text as it was written: nothing more is asked.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import toys
from laboratory import MERGES

from diglot.batches import PairReader, align_pairs
from diglot.data import to_sample
from diglot.engines import Projected, Projector, Reading, TeacherScores
from diglot.rendering import Renderer

SPACE = toys.Texts(length=5, prompts=("a",))
MASS = SPACE.random_distribution(5)[0]
TEXTS = [SPACE.strings[i] for i in np.random.default_rng(0).choice(len(MASS), 60, p=MASS / MASS.sum())]
Tokens = tuple[int, ...]


class Writer:
    """Expects each next token as one who writes every text with its probability in its tokenizer's own tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.width, self.mass = len(tokenizer), Counter[tuple[Tokens, int]]()
        for text, mass in zip(SPACE.strings, MASS, strict=True):
            path = (*toys.encode(tokenizer, text), toys.STOP)
            for n in range(len(path)):
                self.mass[path[:n], path[n]] += mass

    def row(self, before: Tokens) -> np.ndarray:
        """Masses `[V]` of the next token; zero where no text has these tokens."""
        row = np.array([self.mass[before, i] for i in range(self.width)])
        return row / max(row.sum(), 1e-300)


class Case:
    """A pair, and what comes back when a teacher's `top` likeliest ids of each row are projected."""

    def __init__(self, pair: str, top: int, texts: list[str] = TEXTS) -> None:
        student, teacher = (Renderer(toys.bpe(merges), name=pair) for merges in MERGES[pair])
        reader = PairReader(student, teacher, same_vocabulary=False)
        reads = [reader.written(to_sample({"prompt": "a", "completion": text}, where="test")) for text in texts]
        batch = align_pairs(reads, pad_s=student.stop_id, pad_t=teacher.stop_id, on_policy=False)
        self.written, self.writer = batch.written, Writer(student.tokenizer)
        t, other = batch.written.teacher, Writer(teacher.tokenizer)
        rows = np.array([other.row(self.before(t, j)) for j in range(len(t.ids))])
        order = np.argsort(-rows, -1, kind="stable")[:, :top]
        with np.errstate(divide="ignore"):
            named, own = np.log(np.take_along_axis(rows, order, -1)), np.log(rows[np.arange(len(t.ids)), t.ids])
        place = np.arange(len(t.ids)) + 1  # behind one token of a prompt
        reading = Reading(
            batch.written.student.ids,
            np.append(1, t.ids),
            np.arange(len(batch.written.student.ids)),
            place,
            batch.written,
            sum(map(len, texts)),
        )
        self.scores = TeacherScores(np.append(0.0, own), np.pad(order, ((1, 0), (0, 0))), np.pad(named, ((1, 0), (0, 0))))
        self.reading = reading
        self.result: Projected = Projector(student, teacher).project(reading, self.scores)
        self.student, self.teacher = student, teacher

    def before(self, side: Any, at: int) -> Tokens:
        """The tokens of the turn before one."""
        return tuple(side.ids[np.flatnonzero(side.segment[:at] == side.segment[at])].tolist())

    def compare(self, likeliest=None, at=None) -> tuple[np.ndarray, np.ndarray]:
        """Of each row: total variation between what is said and the truth, all that is not named taken as one; and the mass
        that is not named."""
        likeliest = likeliest or self.result.likeliest
        at = self.result.at if at is None else at
        found = []
        for k, i in enumerate(at.tolist()):
            truth = self.writer.row(self.before(self.written.student, i))
            assert truth.sum()
            ids = likeliest.ids[k][likeliest.ids[k] >= 0]
            masses = np.exp(likeliest.logps[k][: len(ids)])
            assert len(set(ids.tolist())) == len(ids) and masses.sum() + likeliest.residual[k] == pytest.approx(1)
            gap = np.abs(truth[ids] - masses).sum() + abs(1 - truth[ids].sum() - likeliest.residual[k])
            found.append(gap / 2)
        return np.array(found), likeliest.residual
