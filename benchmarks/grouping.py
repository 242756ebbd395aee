"""Alignment of two token streams: ours for a whole batch at once, TRL's grouping text by text; and how ours grows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from measure import alternate, check_same, digest

from diglot.alignment import Alignment, Side, align, starts
from diglot.rendering import Renderer


def stream(renderer: Renderer, texts: Sequence[str]) -> Side:
    """The tokens of these texts, one segment each."""
    encoded = renderer.encoder.encode(list(texts))
    segment = np.repeat(np.arange(len(texts)), [len(one.ids) for one in encoded])
    end, exact = (np.concatenate([getattr(one, name) for one in encoded]) for name in ("ends", "exact"))
    return Side(end.astype(np.int64), segment.astype(np.int64), exact, np.zeros(len(end), np.bool_))


def repeated(side: Side, segments: int, tokens: int) -> tuple[Side, int]:
    """The stream again and again, up to at least so many tokens; and its number of segments."""
    times = -(-tokens // len(side.end))
    segment = (side.segment[None] + segments * np.arange(times)[:, None]).ravel()
    end, exact, stop = (np.tile(x, times) for x in (side.end, side.exact, side.stop))
    return Side(end, segment, exact, stop), segments * times


def offsets(side: Side, segments: int) -> list[torch.Tensor]:
    """Byte offsets `[n, 2]` of each segment, as TRL's loss holds them."""
    both = torch.from_numpy(np.stack([starts(side), side.end], axis=-1))
    return list(both.split(np.bincount(side.segment, minlength=segments).tolist()))


def trl_groups(of_s: Sequence[torch.Tensor], of_t: Sequence[torch.Tensor]) -> list[Any]:
    """TRL's grouping of each text, from tensors as its loss calls it."""
    from trl.experimental.gold.gold_trainer import ULDLoss

    return [ULDLoss._align_by_byte_offsets(s.tolist(), t.tolist()) for s, t in zip(of_s, of_t, strict=True)]


def compare(streams: tuple[Side, Side], segments: int, repeats: int) -> dict[str, Any]:
    """Seconds of both on the same tokens, after a check that they find the same chunks."""
    of_s, of_t = (offsets(side, segments) for side in streams)
    alignment = align(*streams, segments)
    sizes = digest(alignment.count_s), digest(alignment.count_t)
    groups = trl_groups(of_s, of_t)
    theirs = [[len(group) for text in groups for group in text[i]] for i in (0, 1)]
    check_same("chunks", ours=sizes, trl=tuple(digest(np.array(x)) for x in theirs))
    timing = alternate(
        {"ours": lambda: _ignore(align(*streams, segments)), "trl": lambda: _ignore(trl_groups(of_s, of_t))}, repeats
    )
    low, high = timing.spread("trl", "ours")
    return {
        "texts": segments,
        "tokens": len(streams[0].end),
        "tokens_t": len(streams[1].end),
        "trl_seconds": timing.median("trl"),
        "seconds": timing.median("ours"),
        "speedup": timing.ratio("trl", "ours"),
        "speedup_low": low,
        "speedup_high": high,
    }


def _ignore(_: Alignment[Any] | list[Any]) -> None:
    return None


def growth(streams: tuple[Side, Side], segments: int, sizes: Sequence[int], repeats: int = 3) -> dict[int, float]:
    """Seconds per million student tokens at each size, the best of a few runs."""
    per_million = {}
    for size in sizes:
        times = -(-size // len(streams[0].end))
        (s, count), (t, _) = (repeated(side, segments, times * len(side.end)) for side in streams)
        best = float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            align(s, t, count)
            best = min(best, time.perf_counter() - start)
        per_million[len(s.end)] = best / len(s.end) * 1e6
    return per_million
