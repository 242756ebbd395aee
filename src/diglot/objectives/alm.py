"""Chunk likelihood matching: is "these bytes come next" as likely to the student as to the teacher?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diglot.alignment import Alignment
from diglot.errors import ConfigError
from diglot.objectives.base import PathObjective, at_least_float32, check_range
from diglot.objectives.chunks import (
    NONCANONICAL,
    check_choice,
    chunk_sums,
    end_gap,
    end_masses,
    usable_chunks,
)
from diglot.objectives.levels import Level
from diglot.objectives.scores import Path, Values

DIVERGENCES = ("kl", "reverse_kl", "tvd")
CHUNKS = ("all", "threshold", "outcome")

_LEAST = 1e-6  # nats; the rounding of a float32 log-prob near 0: quotients of smaller surprisals would be noise
_MOST = 1e4  # nats; an event that one side holds for impossible is still finite


def log1mexp(x: Tensor) -> Tensor:
    """`log(1 - exp(-x))` for `x > 0`, without cancellation at either end, in value and gradient."""
    near = x < math.log(2)
    # The inner `where`: for small x the branch that is not taken is -inf, and its gradient would be NaN.
    return torch.where(near, torch.log(-torch.expm1(-x)), torch.log1p(-torch.exp(-torch.where(near, 1.0, x))))


def event_divergence(logp_s: Tensor, logp_t: Tensor, tau: float | None, divergence: str) -> Tensor:
    """Divergence of two events of log-probabilities `logp_s`, `logp_t`, elementwise, in nats, times `tau`.

    With `P = exp(logp_t)`, `Q = exp(logp_s)` it is that of the coins `P^(1/tau)` and `Q^(1/tau)`: "kl" is
    `KL(P' || Q')`, "reverse_kl" `KL(Q' || P')`, "tvd" `|P' - Q'|`. The factor tau keeps the size as tau grows: with
    surprisals `A = -log P`, `B = -log Q` the limit, `tau=None`, is `A log(A/B) - A + B` for "kl", the same with A and B
    exchanged for "reverse_kl", `|A - B|` for "tvd". Without the factor all would vanish like 1/tau.

    Surprisals are clamped to [1e-6, 1e4] nats, and there is no gradient beyond.
    """
    a, b = (-logp_t).clamp(_LEAST, _MOST), (-logp_s).clamp(_LEAST, _MOST)
    if divergence == "reverse_kl":
        a, b = b, a
    if tau is None:
        return (a - b).abs() if divergence == "tvd" else a * (a.log() - b.log()) - a + b
    a, b = a / tau, b / tau
    if divergence == "tvd":
        return tau * (torch.expm1(-a) - torch.expm1(-b)).abs()
    return tau * (torch.exp(-a) * (b - a) - torch.expm1(-a) * (log1mexp(a) - log1mexp(b)))


class ALM(PathObjective):
    """Approximate likelihood matching (Minixhofer et al., arXiv 2503.20083) of the chunks of the text.

    For each chunk `P = exp(l^T_k)`, `Q = exp(l^S_k)`, and `event_divergence` of "the chunk is written" as a yes or no.
    One value per exact chunk, stop included; student's gradient through `l^S_k`. Asks the teacher for log-probs of the
    text only (and for boundary masses where `reads_boundaries`).

    It is zero where the two likelihoods of every chunk agree. It sees nothing of what was not written. Biases: that a
    prefix is cut into these tokens says already that its end does not merge with what follows, and the two tokenizers
    say it of different ends (tokenization bias; "outcome" is there to undo it); a text may have other spellings in
    tokens than the one read. For tau other than 1 it bounds no divergence of the two distributions over text.

    Args:
        tau: flattens the events; None for the limit of large tau.
        divergence: "kl" (of the teacher's event to the student's), "reverse_kl" or "tvd".
        chunks: "all" takes each as it is.
            "threshold" leaves out chunks with `|log omega_T - log omega_S| > threshold` at their end, where omega is a
            side's mass on "a new word starts, or the turn ends". This estimate of the tokenization bias is ours, read
            from the text at hand; the published filter uses statistics of a corpus.
            "outcome" merges each chunk with those that follow until omega_T at the end is at least `gamma`, and
            compares `P omega_T` with `Q omega_S`: the bytes, and that a word ends there. A merge also ends with its
            segment, where omega is 1, and before a chunk that is not compared. Events of neighbours overlap in the
            boundary, so their product is no likelihood of the text.
        noncanonical: "mask" leaves out chunks that the student's tokenizer would not have written so. "boundary" takes
            `P omega_T` and `Q omega_S` of every chunk, without merging.

    Values stay one per chunk, zero for what is left out, and a merged chunk's value is at the chunk that closes it:
    the average is per exact minimal chunk, known before any model has run. The metric `compared` is 1 for chunks that
    take part in a comparison, else 0.
    """

    name = "alm"

    def __init__(
        self,
        tau: float | None = 100.0,
        divergence: str = "kl",
        chunks: str = "all",
        threshold: float = 0.1,
        gamma: float = 0.1,
        noncanonical: str = "none",
    ) -> None:
        if tau is not None and tau <= 0:
            raise ConfigError(f"tau={tau} cannot flatten an event: choose a value above 0, or None for the limit.")
        check_choice("divergence", divergence, DIVERGENCES)
        check_choice("chunks", chunks, CHUNKS)
        check_choice("noncanonical", noncanonical, NONCANONICAL)
        check_range("threshold", threshold, 0.0, math.inf)
        check_range("gamma", gamma, 0.0, 1.0)
        if chunks == "outcome" and noncanonical == "boundary":
            raise ConfigError(
                "chunks='outcome' multiplies by boundary masses already, noncanonical='boundary' would do it twice: "
                "choose one of them."
            )
        self.tau, self.divergence, self.chunks = tau, divergence, chunks
        self.threshold, self.gamma, self.noncanonical = threshold, gamma, noncanonical
        if self.reads_boundaries:
            self.needs = Level.HIDDEN

    @property
    def reads_boundaries(self) -> bool:
        return self.chunks != "all" or self.noncanonical == "boundary"

    def mask(self, alignment: Alignment[Tensor]) -> Tensor:
        """Exact chunks, `[C]`."""
        return alignment.chunk_exact

    def __call__(self, path: Path, alignment: Alignment[Tensor]) -> tuple[Values, Tensor]:
        count = alignment.num_chunks
        logp_s = chunk_sums(at_least_float32(path.logp_s), alignment.chunk_s, count)
        logp_t = chunk_sums(at_least_float32(path.logp_t.detach()), alignment.chunk_t, count)
        usable = usable_chunks(path, alignment, self.noncanonical, self.name)
        value_at = usable
        if self.reads_boundaries:
            end_s, end_t = end_masses(path, alignment, self.name)
            if self.chunks == "threshold":
                usable = value_at = usable & (end_gap(end_s, end_t).abs() <= self.threshold)
            if self.chunks == "outcome":
                value_at = closing_chunks(usable, end_t, self.gamma)
                logp_s, logp_t = (merged(x, usable, value_at) for x in (logp_s, logp_t))
            if self.chunks == "outcome" or self.noncanonical == "boundary":
                logp_s, logp_t = logp_s + end_s, logp_t + end_t
        at = value_at.nonzero().squeeze(-1)
        divergences = event_divergence(logp_s[at], logp_t[at], self.tau, self.divergence)
        loss = torch.zeros_like(logp_s).index_add(0, at, divergences)
        return Values(loss, {"compared": usable.to(loss.dtype)}), self.mask(alignment)


def closing_chunks(usable: Tensor, end_t: Tensor, gamma: float) -> Tensor:
    """Which chunks close a merge, bool [C]: where omega_T (1 at a segment's end) reaches `gamma`, or before a gap."""
    before_gap = torch.zeros_like(usable)
    before_gap[:-1] = ~usable[1:]
    return usable & ((end_t.exp() >= gamma) | before_gap)


def merged(values: Tensor, usable: Tensor, closing: Tensor) -> Tensor:
    """At each closing chunk the sum of `values` over its merge, elsewhere 0, [C].

    A merge is all usable chunks since the last closing one; it never spans unusable chunks, before which one closes.
    """
    merge = closing.long().cumsum(0) - closing.long()
    total = values.new_zeros(len(values) + 1).index_add(0, merge[usable], values[usable])
    return torch.where(closing, total[merge], 0.0)
