"""A completion as its aligned chunks, with what both models say about each: what people look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from diglot.batches import AlignedBatch
from diglot.batches.written import WrittenSide
from diglot.evaluation.rows import RowFacts, sample_of
from diglot.vocabulary import Vocabulary

Alternatives = list[tuple[str, float]]


@dataclass(frozen=True)
class Chunk:
    """The shortest run of bytes at whose ends both sides have a token boundary."""

    text: str  # bytes that are no text by themselves as \\x..; the student's name of its stop token for stop
    student: list[str]  # its tokens
    teacher: list[str]
    logp_s: float  # nats, log-prob of the chunk's tokens
    logp_t: float
    comparable: bool  # are all tokens exact on both sides? If not, the gap says nothing
    stop: bool
    top_s: Alternatives  # the student's likeliest tokens where the chunk begins, with their probabilities
    top_t: Alternatives


@dataclass(frozen=True)
class Rollout:
    """One prompt, what was written to it, and its chunks in reading order."""

    prompt: str
    completion: str
    stopped: bool  # or cut by the length limit
    num_bytes: int
    on_policy: bool
    chunks: list[Chunk]

    @property
    def gap(self) -> float | None:
        """log p_teacher - log p_student of the comparable chunks, nats per byte; None without any byte."""
        gaps = [c.logp_t - c.logp_s for c in self.chunks if c.comparable]
        return sum(gaps) / self.num_bytes if self.num_bytes and gaps else None

    def as_json(self) -> dict[str, Any]:
        """Plain values for one line of `rollouts.jsonl`."""
        return asdict(self)


def rollouts_of(
    batch: AlignedBatch,
    prompts: Sequence[str],
    facts: tuple[RowFacts, RowFacts],
    vocabularies: tuple[Vocabulary, Vocabulary],
) -> list[Rollout]:
    """The samples of `batch` as rollouts, in its order. `prompts` are theirs; `facts` and vocabularies student first.

    Chunk boundaries come from the alignment; tokens beyond the last shared boundary are in no chunk.
    """
    sample = sample_of(batch.student).numpy()
    first = batch.written.first_s
    chunks: list[list[Chunk]] = [[] for _ in batch.pairs]
    sides = [
        _side(*one)
        for one in zip(
            (batch.written.student, batch.written.teacher),
            (batch.written.alignment.chunk_s, batch.written.alignment.chunk_t),
            facts,
            vocabularies,
            strict=True,
        )
    ]
    for c, token in enumerate(first.tolist()):
        chunks[int(sample[token])].append(_chunk(batch, c, *sides))
    return [
        Rollout(
            prompt,
            "\n".join(part.decode("utf-8", "backslashreplace") for part in pair.student.segment_bytes),
            pair.student.ended,
            sum(map(len, pair.student.segment_bytes)),
            batch.on_policy,
            sample_chunks,
        )
        for prompt, pair, sample_chunks in zip(prompts, batch.pairs, chunks, strict=True)
    ]


@dataclass(frozen=True)
class _Side:
    written: WrittenSide
    facts: RowFacts
    vocabulary: Vocabulary
    bounds: np.ndarray  # [C + 1]: tokens of chunk c are order[bounds[c] : bounds[c + 1]]
    order: np.ndarray

    def tokens(self, chunk: int) -> np.ndarray:
        return self.order[self.bounds[chunk] : self.bounds[chunk + 1]]

    def alternatives(self, token: int) -> Alternatives:
        ids, p = self.facts.top_ids[token].tolist(), self.facts.top_p[token].tolist()
        return [(self.vocabulary.display(i), round(q, 4)) for i, q in zip(ids, p, strict=True)]

    def names(self, tokens: np.ndarray) -> list[str]:
        return [self.vocabulary.display(int(i)) for i in self.written.ids[tokens]]


def _side(written: WrittenSide, chunk: np.ndarray, facts: RowFacts, vocabulary: Vocabulary) -> _Side:
    order = np.flatnonzero(chunk >= 0)
    count = int(chunk.max(initial=-1)) + 1
    return _Side(written, facts, vocabulary, np.searchsorted(chunk[order], np.arange(count + 1)), order)


def _chunk(batch: AlignedBatch, c: int, student: _Side, teacher: _Side) -> Chunk:
    alignment = batch.written.alignment
    mine, theirs = student.tokens(c), teacher.tokens(c)
    text = batch.written.texts[int(alignment.chunk_segment[c])]
    low, high = int(student.written.start[mine[0]]), int(student.written.end[mine[-1]])
    spelt = text[low:high].decode("utf-8", "backslashreplace")
    stop = bool(alignment.chunk_stop[c])
    return Chunk(
        text=spelt + (student.names(mine[-1:])[0] if stop else ""),
        student=student.names(mine),
        teacher=teacher.names(theirs),
        logp_s=_total(student.facts.logp, mine),
        logp_t=_total(teacher.facts.logp, theirs),
        comparable=bool(alignment.chunk_exact[c]),
        stop=stop,
        top_s=student.alternatives(int(mine[0])),
        top_t=teacher.alternatives(int(theirs[0])),
    )


def _total(logp: Tensor, tokens: np.ndarray) -> float:
    return round(float(logp[tokens].double().sum()), 4)
