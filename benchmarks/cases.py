"""One batch of texts as two models read it, with the heads of both and hidden states: what a loss stage starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from measure import BenchError, check_same, demo_trainer, digest, fetch_texts, fetch_tokenizer, prepared_batch
from torch import Tensor, nn
from transformers import AutoTokenizer

from diglot.batches import AlignedBatch, PackedSide, PairReader, ReadPair, align_pairs, pad_id
from diglot.data import to_sample
from diglot.heads import Head, last_hidden
from diglot.objectives import Pair
from diglot.rendering import Renderer
from diglot.vocabulary import Vocabulary


@dataclass
class Model:
    """One side: how it reads, and the part of it that makes logits."""

    tokenizer: Any
    vocabulary: Vocabulary
    stop_ids: tuple[int, ...]
    pad: int
    head: Head
    hidden: Tensor  # [B, T, H]

    @classmethod
    def random(cls, renderer: Renderer, side: PackedSide, width: int, seed: int) -> Model:
        """Random weights and hidden states that give logits of standard deviation 2."""
        draw = torch.Generator().manual_seed(seed)
        module = nn.Linear(width, len(renderer.vocabulary), bias=False)
        with torch.no_grad():
            module.weight.normal_(generator=draw).mul_(2 * width**-0.5)
        hidden = torch.randn(*side.input_ids.shape, width, generator=draw)
        return cls.of(renderer, Head(module), hidden)

    @classmethod
    def of(cls, renderer: Renderer, head: Head, hidden: Tensor) -> Model:
        """The side of a renderer."""
        stops = renderer.stop_ids
        return cls(renderer.tokenizer, renderer.vocabulary, stops, pad_id(renderer), head, hidden)


@dataclass
class Case:
    """What both sides of the comparison are given."""

    name: str
    pairs: list[ReadPair]
    student: Model
    teacher: Model

    def batch(self) -> AlignedBatch:
        """Both readings, padded and aligned anew."""
        return align_pairs(self.pairs, pad_s=self.student.pad, pad_t=self.teacher.pad, on_policy=False)

    @cached_property
    def pair(self) -> Pair:
        """The two vocabularies."""
        s, t = self.student, self.teacher
        return Pair.of(s.vocabulary, t.vocabulary, s.stop_ids, t.stop_ids)

    @property
    def texts(self) -> list[str]:
        """What is scored."""
        return [pair.student.segment_bytes[-1].decode() for pair in self.pairs]


def read_texts(renderers: Sequence[Renderer], rows: Sequence[dict[str, str]], scored: int) -> list[ReadPair]:
    """As many of the rows as give at least `scored` student tokens."""
    reader = PairReader(*renderers, same_vocabulary=False)
    pairs: list[ReadPair] = []
    tokens = 0
    for row in rows:
        if tokens >= scored:
            break
        pair = reader.written(to_sample(row, where="benchmark row"))
        if pair is not None:
            pairs.append(pair)
            tokens += int((pair.student.segment >= 0).sum())
    if tokens < scored:
        raise BenchError(f"{len(rows)} rows of text give {tokens} scored tokens, not {scored}: give more text.")
    return pairs


def random_case(
    name: str,
    renderers: tuple[Renderer, Renderer],
    rows: Sequence[dict[str, str]],
    scored: int,
    widths: tuple[int, int],
    seed: int = 0,
) -> Case:
    """Real tokenizers and text, random heads and hidden states."""
    pairs = read_texts(renderers, rows, scored)
    batch = align_pairs(pairs, pad_s=pad_id(renderers[0]), pad_t=pad_id(renderers[1]), on_policy=False)
    sides = (batch.student, batch.teacher)
    student, teacher = (
        Model.random(renderer, side, width, seed + i)
        for i, (renderer, side, width) in enumerate(zip(renderers, sides, widths, strict=True))
    )
    teacher.head.module.requires_grad_(False)
    return Case(name, pairs, student, teacher)


def demo_case(rows: int) -> Case:
    """The demo pair: its own heads, and the hidden states that its models have for real text."""
    trainer = demo_trainer("strict", rows)
    batch = prepared_batch(trainer).views[0].read
    with torch.no_grad():
        hidden = [
            last_hidden(model, side.input_ids, side.attention_mask)
            for model, side in ((trainer.student, batch.student), (trainer.comparisons[0].teacher.model, batch.teacher))
        ]
    heads = trainer.student_head, trainer.comparisons[0].teacher.head
    sides = [
        Model.of(renderer, _alone(head), states)
        for renderer, head, states in zip(
            (trainer.student_renderer, trainer.comparisons[0].teacher.renderer), heads, hidden, strict=True
        )
    ]
    sides[1].head.module.requires_grad_(False)
    return Case("smollm2-gemma3", batch.pairs, *sides)


def _alone(head: Head) -> Head:
    """The head on a copy of its weight, without the model."""
    rows, width = head.module.weight.shape
    module = nn.Linear(width, rows, bias=False)
    module.weight.data.copy_(head.module.weight.data)
    return Head(module, scale=head.scale, softcap=head.softcap, name=head.name)


def real_renderer(name: str, size: int | None = None) -> Renderer:
    """A tokenizer of the demo's assets, whose table is as wide as the model's logits."""
    return Renderer(AutoTokenizer.from_pretrained(fetch_tokenizer(name)), num_embeddings=size, name=name)


def whole_texts(words: int = 48) -> list[dict[str, str]]:
    """All training passages, cut as `rows_of_text` cuts them."""
    texts = [row["text"].split(" ") for row in fetch_texts("passages", "train")]
    return [{"prompt": " ".join(w[:12]), "completion": " " + " ".join(w[12:words])} for w in texts if len(w) > 16]


# ---- TRL's inputs ------------------------------------------------------------------------------------------------


@dataclass
class TRLSide:
    """One side as TRL's loss takes it."""

    input_ids: Tensor  # [B, T]
    labels: Tensor  # [B, T], -100 where nothing is scored
    offsets: Tensor  # [B, T, 2] bytes in the completion

    @classmethod
    def of(cls, side: PackedSide, start: Any) -> TRLSide:
        """From our packed side: the same ids at the same places, stop at the end of the text, as TRL has it."""
        labels = torch.full_like(side.input_ids, -100).flatten()
        labels[side.rows + 1] = side.targets
        offsets = torch.zeros(labels.shape[0], 2, dtype=torch.int64)
        begin, end = torch.from_numpy(start), torch.from_numpy(side.end)
        offsets[side.rows + 1] = torch.stack([begin, torch.where(side.stop, begin, end)], dim=-1)
        shape = side.input_ids.shape
        return cls(side.input_ids, labels.view(shape), offsets.view(*shape, 2))

    def scored(self) -> list[tuple[list[int], list[list[int]]]]:
        """Ids and offsets of every text, without the stop token."""
        return [
            (ids[mask][:-1].tolist(), offsets[mask][:-1].tolist())
            for ids, mask, offsets in zip(self.input_ids, self.labels >= 0, self.offsets, strict=True)
        ]


def trl_sides(batch: AlignedBatch) -> tuple[TRLSide, TRLSide]:
    """Both sides of a batch for TRL's loss."""
    written = batch.written
    return TRLSide.of(batch.student, written.student.start), TRLSide.of(batch.teacher, written.teacher.start)


def check_trl_reading(case: Case) -> list[str]:
    """What TRL's own encoder makes of the texts: `BenchError` if it is not what we hand its loss; notes of refusals."""
    from trl.experimental.utils import encode_with_byte_offsets

    notes = []
    for name, model, side in zip(
        ("student", "teacher"), (case.student, case.teacher), trl_sides(case.batch()), strict=True
    ):
        try:
            own = encode_with_byte_offsets(model.tokenizer.backend_tokenizer, case.texts)
        except NotImplementedError as refusal:
            notes.append(f"TRL refuses the {name}'s tokenizer for grouping ({refusal}); its loss is handed our offsets")
            continue
        check_same(
            f"{case.name}: the {name}'s tokens",
            trl=digest([(ids, [list(o) for o in offsets]) for ids, offsets in own]),
            ours=digest(side.scored()),
        )
    return notes


def fingerprint_ours(batch: AlignedBatch) -> str:
    """Which tokens of which texts are read, and where both sides have a boundary."""
    w = batch.written
    tokens = [[side.segment[k], side.ids[k], side.end[k]] for side in (w.student, w.teacher) for k in [~side.stop]]
    last = w.alignment.chunk_s[1:] != w.alignment.chunk_s[:-1]
    ends = np.append(last, True) & (w.alignment.chunk_s >= 0) & ~w.student.stop
    return digest(*(part for side in tokens for part in side), w.student.segment[ends], w.student.end[ends])


def trl_boundaries(sides: tuple[TRLSide, TRLSide]) -> tuple[list[int], list[int]]:
    """Text and byte of every end of a chunk, by TRL's own grouping."""
    from trl.experimental.gold.gold_trainer import ULDLoss

    texts, ends = [], []
    for k, ((_, of_s), (_, of_t)) in enumerate(zip(*(side.scored() for side in sides), strict=True)):
        for group_s, group_t in zip(*ULDLoss._align_by_byte_offsets(of_s, of_t), strict=True):
            if group_s and group_t and of_s[group_s[-1]][1] == of_t[group_t[-1]][1]:
                texts.append(k)
                ends.append(of_s[group_s[-1]][1])
    return texts, ends


def fingerprint_trl(sides: tuple[TRLSide, TRLSide]) -> str:
    """The same, from what TRL's loss is given and from its own grouping of it."""
    parts: list[list[int]] = []
    for side in (one.scored() for one in sides):
        parts.append([k for k, (ids, _) in enumerate(side) for _ in ids])
        parts.append([i for ids, _ in side for i in ids])
        parts.append([end for _, offsets in side for _, end in offsets])
    return digest(*parts, *trl_boundaries(sides))
