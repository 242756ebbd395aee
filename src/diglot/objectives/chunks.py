"""What is known of the text chunk by chunk: sums of log-probs, and how likely a word ends where the chunk does.

Shapes: `N` packed tokens of a side, `C` chunks. Log-probs and log masses in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diglot.alignment import Alignment
from diglot.errors import ConfigError
from diglot.objectives.base import at_least_float32
from diglot.objectives.scores import Path
from diglot.sums import running_sums

NONCANONICAL = ("none", "mask", "boundary")


def chunk_sums(values: Tensor, chunk: Tensor, num_chunks: int) -> Tensor:
    """Sum of token values over each chunk, [C]; tokens in no chunk (-1) are left out."""
    return values.new_zeros(num_chunks + 1).index_add(0, _slot(chunk, num_chunks), values)[:num_chunks]


def _slot(chunk: Tensor, num_chunks: int) -> Tensor:
    """The chunk of each token; one more for those in none, so that no size depends on values of the device."""
    return torch.where(chunk >= 0, chunk, num_chunks)


def suffix_in_chunk(values: Tensor, chunk: Tensor, num_chunks: int) -> Tensor:
    """For token `i` the sum of `values` from `i` to the end of its chunk, [N]. Tokens of a chunk are consecutive."""
    if not num_chunks:
        return torch.zeros_like(values)
    exact = values.double()  # a difference of running sums: float32 would round at the size of the whole batch
    inside = chunk >= 0
    masked = torch.where(inside, exact, 0.0)
    total = running_sums(masked)
    at, slot = torch.arange(len(chunk), device=chunk.device), _slot(chunk, num_chunks)
    last = chunk.new_zeros(num_chunks + 1).scatter_reduce(0, slot, at, "amax", include_self=False)
    return torch.where(inside, total[last[chunk.clamp(min=0)]] - (total - masked), 0.0).to(values.dtype)


def first_in_chunk(chunk: Tensor, num_chunks: int) -> Tensor:
    """Index of the token that opens each chunk, int64 [C]. Tokens in no chunk have -1."""
    at, slot = torch.arange(len(chunk), device=chunk.device), _slot(chunk, num_chunks)
    return chunk.new_zeros(num_chunks + 1).scatter_reduce(0, slot, at, "amin", include_self=False)[:num_chunks]


def last_of_segment(segment: Tensor) -> Tensor:
    """Which chunks are the last of their segment, bool [C]."""
    last = torch.ones_like(segment, dtype=torch.bool)
    last[:-1] = segment[1:] != segment[:-1]
    return last


def end_mass(boundary: Tensor, chunk: Tensor, alignment: Alignment[Tensor]) -> Tensor:
    """Log omega, [C]: a side's mass, at the end of each chunk, on "a new word starts here, or the turn ends".

    `boundary [N]` holds the log mass in the row that predicts each token, so the one at the end of a chunk is that of
    the next chunk's first token. At a segment's last chunk nothing follows: omega is 1 there.
    """
    if not alignment.num_chunks:
        return at_least_float32(boundary).new_zeros(0)
    first = first_in_chunk(chunk, alignment.num_chunks)
    following = at_least_float32(boundary)[torch.cat([first[1:], first[:1]])]
    return following.masked_fill(last_of_segment(alignment.chunk_segment), 0.0)


def end_masses(path: Path, alignment: Alignment[Tensor], name: str) -> tuple[Tensor, Tensor]:
    """`end_mass` of the student, with its gradient, and of the teacher, constant. `name` is who asks, for the error."""
    if path.boundary_s is None or path.boundary_t is None:
        raise ConfigError(f"objective {name!r} reads boundary masses with these options, and the path has none.")
    end_s = end_mass(path.boundary_s, alignment.chunk_s, alignment)
    return end_s, end_mass(path.boundary_t.detach(), alignment.chunk_t, alignment)


def end_gap(end_s: Tensor, end_t: Tensor) -> Tensor:
    """`log omega_T - log omega_S`, [C], without gradient; 0 where both masses are 0."""
    end_s, end_t = end_s.detach(), end_t.detach()
    nowhere = (end_s == -math.inf) & (end_t == -math.inf)
    return torch.where(nowhere, 0.0, end_t - end_s)


def usable_chunks(path: Path, alignment: Alignment[Tensor], noncanonical: str, name: str) -> Tensor:
    """Which chunks are compared, bool [C]: the exact ones; with "mask" only those with no noncanonical student token.

    `name` is who asks, for the error.
    """
    if noncanonical != "mask":
        return alignment.chunk_exact
    if path.noncanonical is None:
        raise ConfigError(
            f"objective {name!r} with noncanonical='mask' needs path.noncanonical, and the path has none."
        )
    odd = chunk_sums(path.noncanonical.long(), alignment.chunk_s, alignment.num_chunks) > 0
    return alignment.chunk_exact & ~odd


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise `ConfigError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is unknown: choose one of {', '.join(choices)}.")
