"""A random text as two tokenizers cut it, with scores, for tests of objectives of what was written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diglot.alignment import Alignment, Side, align
from diglot.objectives import Path

DOUBLE = torch.float64


def side(*segments: Sequence[int], inexact: Sequence[int] = (), stopped: Sequence[int] = ()) -> Side:
    """Segments by the byte ends of their tokens; tokens `inexact` by index; segments `stopped` end with stop."""
    end = np.array([e for s in segments for e in s], dtype=np.int64)
    segment = np.array([k for k, s in enumerate(segments) for _ in s], dtype=np.int64)
    exact, stop = np.ones(len(end), bool), np.zeros(len(end), bool)
    exact[list(inexact)] = False
    for k in stopped:
        stop[np.flatnonzero(segment == k)[-1]] = True
    return Side(end=end, segment=segment, exact=exact, stop=stop)


def aligned(student: Side, teacher: Side) -> Alignment[Tensor]:
    return align(student, teacher, int(student.segment.max()) + 1).to("cpu")


def random_alignment(seed: int) -> Alignment[Tensor]:
    """Four segments, two of them stopped, with an inexact token on either side."""
    draw = np.random.default_rng(seed)
    cuts: tuple[list[list[int]], list[list[int]]] = ([], [])
    for k in range(4):
        length = int(draw.integers(6, 15))
        for of_side in cuts:
            inner = np.flatnonzero(draw.random(length - 1) < 0.6) + 1
            of_side.append([*inner.tolist(), length, *([length + 1] if k % 2 else [])])
    sides = [side(*c, inexact=[int(draw.integers(0, 12))], stopped=[1, 3]) for c in cuts]
    return aligned(*sides)


def random_path(alignment: Alignment[Tensor], seed: int, scale: float = 1.0) -> Path:
    """Scores with all that an objective may ask for; boundary masses between e^-6 and 1."""
    generator = torch.Generator().manual_seed(seed)

    def negative(n: int, size: float) -> Tensor:
        return -torch.rand(n, generator=generator, dtype=DOUBLE) * size - 1e-3

    n_s, n_t = len(alignment.chunk_s), len(alignment.chunk_t)
    return Path(
        logp_s=negative(n_s, 3 * scale).requires_grad_(),
        logp_t=negative(n_t, 3 * scale),
        noncanonical=torch.rand(n_s, generator=generator) < 0.15,
        boundary_s=negative(n_s, 6).requires_grad_(),
        boundary_t=negative(n_t, 6),
        logp_reference_s=negative(n_s, 3),
        logp_reference_t=negative(n_t, 3),
    )


def tokens_of(chunk: Tensor, k: int) -> list[int]:
    return [i for i, c in enumerate(chunk.tolist()) if c == k]


def plain_end(boundary: Tensor, chunk: Tensor, alignment: Alignment[Tensor], k: int) -> float:
    """Log omega at the end of chunk k, as its definition says."""
    segment = alignment.chunk_segment.tolist()
    if k + 1 == len(segment) or segment[k + 1] != segment[k]:
        return 0.0
    return boundary[tokens_of(chunk, k + 1)[0]].item()
