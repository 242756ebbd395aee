"""Pairs of renderings as one batch: padded inputs of both sides and the alignment of their scored tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from diglot.alignment import Alignment, Side, align
from diglot.batches.packed import PackedSide, pack
from diglot.batches.reading import ReadPair
from diglot.batches.sending import sent_records
from diglot.batches.written import Written, WrittenSide
from diglot.rendering import Rendered, Role


@dataclass(frozen=True)
class AlignedBatch:
    """Texts as student and one teacher read them, padded, and aligned."""

    pairs: list[ReadPair]
    student: PackedSide
    teacher: PackedSide
    alignment: Alignment[Tensor]  # torch tensors
    written: Written  # the same and the tokens, as numpy arrays
    stats: dict[str, float]  # sums and counts for the log
    on_policy: bool
    noncanonical: Tensor  # bool [N_s] student tokens that its own tokenizer would have cut otherwise

    @cached_property
    def prompts(self) -> Tensor | None:
        """Which prompt each segment answers, int64 [num_segments]; None where no prompt has several replies."""
        numbers: dict[bytes, int] = {}
        prompt_of_segment: list[int] = []
        for pair in self.pairs:
            key = pair.student.ids[pair.student.roles == Role.PROMPT].tobytes()
            segments = max(len(pair.student.segment_bytes), len(pair.teacher.segment_bytes))
            prompt_of_segment += [numbers.setdefault(key, len(numbers))] * segments
        return torch.tensor(prompt_of_segment, dtype=torch.int64) if len(numbers) < len(prompt_of_segment) else None

    def to(self, device: torch.device) -> AlignedBatch:
        """The same with inputs and alignment on `device`, in one copy."""
        own, *parts = sent_records([self, self.student, self.teacher, self.alignment], device)
        moved: AlignedBatch = replace(own, **dict(zip(("student", "teacher", "alignment"), parts, strict=True)))
        return moved


def align_pairs(
    pairs: Sequence[ReadPair | None],
    *,
    pad_s: int,
    pad_t: int,
    on_policy: bool,
    unscored_roles: frozenset[Role] = frozenset(),
) -> AlignedBatch:
    """Pad, pack and align. Dropped samples (None) take no place; a batch of nothing else becomes one row of padding.

    Tokens of `unscored_roles` on the student's side count as not comparable: their chunks carry no loss.
    """
    present = [pair for pair in pairs if pair is not None]
    segments = [max(len(p.student.segment_bytes), len(p.teacher.segment_bytes)) for p in present]
    student = pack([p.student for p in present] or [_nothing(pad_s)], segments or [0], pad_s)
    teacher = pack([p.teacher for p in present] or [_nothing(pad_t)], segments or [0], pad_t)
    excluded = np.isin(student.role, [int(role) for role in unscored_roles])
    side_s, side_t = (
        Side(end=side.end, segment=side.segment, exact=exact, stop=side.stop.numpy())
        for side, exact in ((student, student.exact & ~excluded), (teacher, teacher.exact))
    )
    aligned = align(side_s, side_t, sum(segments))
    in_exact = aligned.in_exact_chunk(aligned.chunk_s)
    stats = {
        "tokens": float((~excluded).sum()),
        "covered": float(in_exact.sum()),
        "one_to_one": float(len(aligned.pair_s)),
        "dropped": float((aligned.chunk_s < 0).sum()),
        "chunks": float(aligned.chunk_exact.sum()),
        "written": float(sum(_written(p.student, on_policy) for p in present)),
        "unscored": float(excluded.sum()),
        "excluded": float(excluded.sum() + sum(p.student.own_markup for p in present)),
    }
    written_s, written_t = (
        WrittenSide(packed.targets.numpy(), side.end, side.segment, side.exact, side.stop)
        for packed, side in ((student, side_s), (teacher, side_t))
    )
    written = Written(written_s, written_t, aligned, _common_texts(present, segments), excluded)
    noncanonical = np.concatenate([p.noncanonical for p in present] or [np.zeros(0, np.bool_)])
    stats["noncanonical"] = float(noncanonical.sum())
    return AlignedBatch(
        present,
        student,
        teacher,
        aligned.to("cpu"),
        written,
        stats,
        on_policy,
        torch.from_numpy(noncanonical),
    )


def sampler_logps(pairs: Sequence[ReadPair]) -> Tensor | None:
    """What the engine said about the scored tokens that it sampled, float32 `[N_s]`, nats; None if it said nothing."""
    logps = [p.sampler_logps for p in pairs if p.sampler_logps is not None]
    if not logps or len(logps) < len(pairs):
        return None
    return torch.from_numpy(np.concatenate(logps)).float()


def text_sums(pairs: Sequence[ReadPair], on_policy: bool) -> dict[str, float]:
    """Sums over the student's texts, for the log: tokens `written`, `bytes`, how many `ended`, and `samples`."""
    return {
        "written": float(sum(_written(p.student, on_policy) for p in pairs)),
        "bytes": float(sum(len(text) for p in pairs for text in p.student.segment_bytes)),
        "ended": float(sum(p.student.ended for p in pairs)),
        "samples": float(len(pairs)),
    }


def _written(student: Rendered, on_policy: bool) -> int:
    """Tokens that the writer wrote, scored or not. Of a text that was rendered, those are the scored ones."""
    return int(((student.segment >= 0) | (student.roles != Role.PROMPT)).sum()) if on_policy else len(student.scored)


def _common_texts(pairs: Sequence[ReadPair], segments: Sequence[int]) -> list[bytes]:
    """The bytes of every segment, as far as both sides hold them."""
    texts = []
    for pair, count in zip(pairs, segments, strict=True):
        both = zip(pair.student.segment_bytes, pair.teacher.segment_bytes, strict=False)
        common = [min(mine, theirs, key=len) for mine, theirs in both]
        texts += common + [b""] * (count - len(common))
    return texts


def _nothing(pad_id: int) -> Rendered:
    """One unscored token: keeps a batch without samples runnable, so that all ranks take part in the step."""
    return Rendered(
        ids=np.array([pad_id]),
        roles=np.array([Role.PROMPT], dtype=np.int8),
        segment=np.array([-1], dtype=np.int32),
        end=np.zeros(1, dtype=np.int64),
        exact=np.zeros(1, dtype=np.bool_),
        segment_bytes=(),
        stopped=(),
    )
