"""The probability of a chunk, as an objective reads it off both paths, against that of the same bytes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from support.oracle import STOP, Distribution, cylinder, next_byte_distribution, text_probability
from support.oracle_readings import FLOOR, Reading, log_of
from torch import Tensor

SPACE = ord(" ")


@dataclass(frozen=True)
class Chunks:
    """One side's chunks, `[C]` each, in nats. "Break" is the event that a space, or the end of the text, follows."""

    logp: Tensor  # log-probability of its tokens
    break_after: Tensor  # log mass, in the row behind the chunk, of tokens that begin with a space, and stop
    break_before: Tensor  # the same in the row before it; 0 at the start of a text
    true: Tensor  # log-probability that the text goes on with the chunk's bytes, given the bytes before
    true_break: Tensor  # that it does so and then breaks
    true_between: Tensor  # the same, given that it breaks before the chunk too


def chunks_of(reading: Reading, student: bool) -> Chunks:
    """The student's or the teacher's."""
    batch, distribution = reading.batch, reading.student if student else reading.teacher
    written, rows = batch.written, reading.rows_s if student else reading.rows_t
    side, first = (written.student, written.first_s) if student else (written.teacher, written.first_t)
    chunk = batch.alignment.chunk_s if student else batch.alignment.chunk_t
    logp = rows.gather(-1, torch.from_numpy(side.ids)[:, None]).squeeze(-1)
    sums = logp.new_zeros(batch.alignment.num_chunks).index_add(0, chunk, logp)
    breaking = [
        i for i, piece in enumerate(distribution.toy.pieces) if piece.startswith(b" ") or i == distribution.toy.stop
    ]
    before = rows[torch.from_numpy(first)][:, breaking].logsumexp(-1)
    before = torch.where(torch.from_numpy(side.start[first]) == 0, 0.0, before)
    stop = batch.alignment.chunk_stop
    after = torch.where(stop, 0.0, before.roll(-1))
    places = zip(side.segment[first].tolist(), side.start[first].tolist(), strict=True)
    events = [_events(distribution, reading.texts[k], start) for k, start in places]
    whole, broken = log_of(e for e, _, _ in events), log_of(e for _, e, _ in events)
    text = log_of(e for _, _, e in events)
    after_whole, after_broken = (torch.where(stop, text, event.roll(-1)) for event in (whole, broken))
    return Chunks(sums, after, before, after_whole - whole, after_broken - whole, after_broken - broken)


@cache
def _events(distribution: Distribution, text: bytes, position: int) -> tuple[float, float, float]:
    """Probability that a text begins as this one up to `position`; that it breaks there (anything does at the start);
    that it is this text."""
    begins = cylinder(distribution, text[:position])
    following = next_byte_distribution(distribution, text[:position])
    breaks = float(following[STOP] + following[SPACE]) if position else 1.0
    return begins, begins * breaks, text_probability(distribution, text)


def between_breaks(reading: Reading) -> Tensor:
    """Which chunks stand between breaks behind a letter, or the edges of the text, bool `[C]`."""
    written = reading.batch.written
    segment, start = written.student.segment[written.first_s], written.student.start[written.first_s]

    def breaks(text: bytes, position: int) -> bool:
        return position == 0 or (text[position - 1] != SPACE and text[position : position + 1] in (b" ", b""))

    begins = torch.tensor([breaks(reading.texts[k], at) for k, at in zip(segment, start, strict=True)])
    return begins & (begins.roll(-1) | reading.batch.alignment.chunk_stop)


def mean_gap(reading: Reading, gap: Tensor, where: Tensor | None = None) -> float:
    """Mean size over chunks, weighted by the student's probability of their text; events of no mass are left out."""
    weight = reading.mass[torch.from_numpy(reading.batch.written.alignment.chunk_segment)]
    known = gap.abs() < -FLOOR / 2 if where is None else where & (gap.abs() < -FLOOR / 2)
    return float((weight * gap.abs())[known].sum() / weight[known].sum())
