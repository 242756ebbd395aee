"""Runs both models over texts and samples and collects sums per sample."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from diglot.batches import AlignedBatch, PackedSide, PairReader, ReadPair, align_pairs, pack
from diglot.data import Sample
from diglot.evaluation.reports import OnPolicyReport, ReferenceReport
from diglot.evaluation.rows import RowFacts, compare, row_facts, sample_of, sample_sums
from diglot.heads import Head, default_chunk_rows, evaluating, last_hidden
from diglot.objectives import Pair
from diglot.rendering import Conversation
from diglot.rollouts import TransformersSampler
from diglot.teachers import Teacher, gives_rows

Item = TypeVar("Item")


class Evaluator:
    """Evaluates a student, alone on reference text or against a teacher on its own samples.

    Args:
        model: the student; its training mode is put back after each evaluation.
        reader: how both sides read a sample.
        teacher: the teacher.
        pair: what their vocabularies are to each other.
        batch_size: samples that are read at a time.
    """

    def __init__(
        self, model: PreTrainedModel, reader: PairReader, teacher: Teacher, pair: Pair, *, batch_size: int = 8
    ) -> None:
        self.model, self.reader, self.teacher, self.batch_size = model, reader, teacher, batch_size
        self.head = Head.of(model)
        self.pair = pair.to(model.device)
        self.chunk_rows = default_chunk_rows(pair.size_s, pair.size_t, model.device)

    @torch.no_grad()
    def on_reference(self, samples: Sequence[Sample]) -> ReferenceReport:
        """Bits per byte of the samples' completions, and how the model's stop fits where they end."""
        columns: list[tuple[np.ndarray, ...]] = []
        rendered = [r for s in samples if (r := self.reader.reference(s)) is not None]
        with evaluating(self.model):
            for batch in _batches(rendered, self.batch_size):
                side = pack(batch, [len(r.segment_bytes) for r in batch], _any_id(self.reader)).to(self.model.device)
                facts = self._facts(self._hidden(side), side, self.head, self.pair.stop_s)
                ends, sample, num = side.stop.cpu(), sample_of(side), len(batch)
                size = np.array([sum(map(len, r.segment_bytes)) for r in batch], dtype=np.float64)
                sums = [sample_sums(v, sample, num) for v in (-facts.logp * ~ends, facts.stop * ends, facts.stop)]
                ended = np.array([r.stopped[-1] for r in batch], dtype=np.float64)
                columns.append((sums[0], size, sums[1], sums[2], ended))
        return ReferenceReport(*map(np.concatenate, zip(*columns, strict=True))) if columns else _nothing_read()

    @torch.no_grad()
    def reference_gap(self, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
        """log p_teacher - log p_student of each sample's reply, nats, and its bytes, `[M]` each."""
        parts = []
        with evaluating(self.model):
            for batch in _batches([p for s in samples if (p := self.reader.written(s)) is not None], self.batch_size):
                columns = self._judge(self._aligned(batch, on_policy=False))
                parts.append((-columns["gap"], columns["num_bytes"]))
        gaps, sizes = zip(*parts, strict=True) if parts else ((np.zeros(0),), (np.zeros(0),))
        return np.concatenate(gaps), np.concatenate(sizes)

    def _aligned(self, pairs: Sequence[ReadPair], on_policy: bool) -> AlignedBatch:
        pads = _any_id(self.reader), self.teacher.renderer.stop_id
        return align_pairs(pairs, pad_s=pads[0], pad_t=pads[1], on_policy=on_policy).to(self.model.device)

    @torch.no_grad()
    def on_policy(
        self, conversations: Sequence[Conversation], sampler: TransformersSampler, *, max_new_tokens: int, seed: int
    ) -> OnPolicyReport:
        """The student answers each conversation once; the teacher scores what it wrote."""
        parts: list[dict[str, np.ndarray]] = []
        texts: list[str] = []
        with evaluating(self.model):
            for i, batch in enumerate(_batches(conversations, self.batch_size)):
                pairs = self.write(batch, sampler, max_new_tokens, seed + i)
                texts += [p.student.segment_bytes[-1].decode("utf-8", "replace") for p in pairs]
                parts.append(self._judge(self._aligned(pairs, on_policy=True)))
        columns = {
            name: np.concatenate([part[name] for part in parts] or [np.zeros(0)]) for name in OnPolicyReport.columns()
        }
        return OnPolicyReport(**columns, completions=texts)

    def write(
        self, conversations: Sequence[Conversation], sampler: TransformersSampler, max_new_tokens: int, seed: int
    ) -> list[ReadPair]:
        """The model's completions of those conversations that fit, as both sides read them."""
        prompts = [(c, p) for c in conversations if (p := self.reader.prompt_ids(c, max_new_tokens)) is not None]
        written = sampler(self.model, [p for _, p in prompts], max_new_tokens=max_new_tokens, seed=seed)
        read = [self.reader.sampled(c, ids, p) for (c, p), ids in zip(prompts, written, strict=True)]
        return [pair for pair in read if pair is not None]

    def _judge(self, batch: AlignedBatch) -> dict[str, np.ndarray]:
        """The columns of an `OnPolicyReport` for one batch."""
        pending = self.teacher.ask(batch.teacher)  # if it answers by itself, then while the student reads
        student = self._facts(self._hidden(batch.student), batch.student, self.head, self.pair.stop_s)
        return compare(batch, student, self._teacher_facts(batch, pending))

    def _teacher_facts(self, batch: AlignedBatch, pending: Any) -> RowFacts:
        """As `_facts`; NaN for stop probabilities that a served teacher does not give."""
        if gives_rows(self.teacher):
            hidden = self.teacher.hidden(batch.teacher) if pending is None else pending.result()
            return self._facts(hidden, batch.teacher, self.teacher.head, self.pair.stop_t)
        scores = pending.result()
        logps = scores.text(stop_as_set=True)
        return RowFacts(logps, torch.full_like(logps, math.nan), scores.top_ids, scores.top_logps.exp())

    def _hidden(self, side: PackedSide) -> Tensor:
        return last_hidden(self.model, side.input_ids, side.attention_mask).flatten(0, 1)[side.rows]

    def _facts(self, hidden: Tensor, side: PackedSide, head: Head, stop_ids: Tensor) -> RowFacts:
        return row_facts(hidden, side, head, stop_ids, self.chunk_rows)


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _nothing_read() -> ReferenceReport:
    return ReferenceReport(*(np.zeros(0) for _ in range(5)))


def _any_id(reader: PairReader) -> int:
    """Padding is masked everywhere, so any id of the vocabulary will do."""
    return reader.student.stop_id
