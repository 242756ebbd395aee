"""Generalised JSD on the tokens that both vocabularies have, sorted L1 on the others, chunk by chunk."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from diglot.arrays import Bools, Ints
from diglot.batches import Written
from diglot.batches.sending import sent
from diglot.errors import ConfigError
from diglot.objectives.base import RowObjective, at_least_float32, check_range
from diglot.objectives.divergences import generalized_jsd
from diglot.objectives.pair import Pair
from diglot.objectives.scores import Rows, Scores, Values
from diglot.objectives.strict import check_columns
from diglot.objectives.uld import sorted_l1

_TRL_FLOOR = math.log(1e-8)  # TRL takes no logarithm of less, and multiplies by no less


class Gold(RowObjective):
    """TRL's GOLD on aligned chunks: `w_M JSD_beta(P, Q on M) + w_U sortedL1(P, Q outside M)`, one value per chunk.

    After "Unlocking On-Policy Distillation for Any Model Family" (TRL's GOLD trainer, the "bayesian" merge; the sorted
    L1 is ULD, arXiv 2402.12030; JSD_beta is GKD's, arXiv 2306.13649 eq. 4, in TRL's convention: 0 forward
    KL(teacher || student), 1 reverse).

    A chunk's merged distribution is the distribution of its last token times the probability of the tokens of the
    chunk before it as they were written, `P(v) = p_e(v) * prod_{i<e} p_i(s_i)`: at most 1 in sum. The student's
    factor carries gradient. M are the tokens of equal bytes, and stop: the mass of each side's whole stop set. On M
    nothing is renormalised.

    `weights="mass"`: both weights are 1. The masses in M and outside it are factors of the two parts already.
    `weights="count"`, TRL's: `w_M = |M| / |V_T|`, `w_U = 1 - w_M`, ids of the teacher counted. The fewer tokens are
    shared, the closer this comes to ULD, however likely the shared ones are.

    Sees every alternative, but outside M only spectra (see `uld`), so zero does not mean that the distributions
    agree. For 0 < beta < 1 it is never negative, and zero with zero gradient where the distributions agree. At 0 and
    1 the KL of distributions that do not sum to one may be negative and is stationary at equal distributions only if
    M holds all mass and the chunk is one token: at 0 each student token outside M is pushed down by its probability
    times the teacher's mass on M, whatever the teacher thinks of it. Merging asks about the written cut of a chunk:
    other cuts of the same bytes are not summed, and unlikely beginnings make their chunk weigh little.

    `gold_as_shipped`: TRL 1.16.0's default reading instead, faults included, to compare with. Each token is read one
    row late, in the row that predicts the token after it; a chunk is the distribution read for its *first* token
    times the probabilities read for the later ones ("observed"); weights by count; stop is no event; tokens match by
    their strings, special tokens too. Probabilities below 1e-8 are raised to that where a logarithm is taken. Its
    cross-entropy weight is 0 by default, its temperatures are 1. A chunk that ends its segment has no row that late
    and is left out, as TRL leaves out the end-of-text token; of text that was cut off, TRL leaves out each side's
    last token and compares what precedes it, chunk or not. Its reduction is a mean over the chunks of a text, then
    over texts; here the values are per chunk.

    Metrics: `matched` and `unmatched`, the two parts before their weights; `mass_s`, `mass_t`, the probability of M in
    the row that is read, in [0, 1].
    """

    name = "gold"

    def __init__(
        self, pair: Pair, *, beta: float = 0.5, weights: str | None = None, gold_as_shipped: bool = False
    ) -> None:
        super().__init__(pair)
        check_range("beta", beta, 0.0, 1.0)
        self.beta, self.gold_as_shipped = beta, gold_as_shipped
        if gold_as_shipped:
            self.matched_s, self.matched_t = matched_strings(pair)
            self.stop_s = self.stop_t = torch.zeros(0, dtype=torch.int64)
        else:
            check_columns(pair)
            self.matched_s, self.matched_t = pair.shared_s, pair.shared_t
            self.stop_s, self.stop_t = pair.stop_s, pair.stop_t
        self.others_s = all_but(torch.cat([self.matched_s, self.stop_s]), pair.size_s)
        self.others_t = all_but(torch.cat([self.matched_t, self.stop_t]), pair.size_t)
        by_count = _is_count(weights, gold_as_shipped)
        self.weight_m = 1 - len(self.others_t) / pair.size_t if by_count else 1.0
        self.weight_u = len(self.others_t) / pair.size_t if by_count else 1.0

    def rows(self, written: Written) -> Rows:
        chunks, read_s, read_t = self._read(written)
        late = int(self.gold_as_shipped)
        skipped = {"not_exact": int((~written.alignment.chunk_exact).sum())}
        skipped["no_row"] = written.alignment.num_chunks - len(chunks) - skipped["not_exact"]
        return Rows(torch.from_numpy(read_s[chunks] + late), torch.from_numpy(read_t[chunks] + late), skipped=skipped)

    def extra(self, rows: Rows, written: Written, scores: Scores) -> dict[str, Tensor]:
        """`rest_s` and `rest_t`: log-prob of the tokens of each row's chunk whose distribution is not the one that
        is read."""
        chunks, read_s, read_t = self._read(written)
        chunk_s, chunk_t = written.alignment.chunk_s, written.alignment.chunk_t
        other_s, other_t = other_tokens(chunk_s, read_s, chunks), other_tokens(chunk_t, read_t, chunks)
        if self.gold_as_shipped:
            logp_s, logp_t = late_logps(written, other_s, other_t, scores)
        else:  # of these tokens alone: few chunks have several, and the whole path would run both heads once more
            like = rows.student
            logp_s = scores.student_logps(_on(other_s, like), _on(written.student.ids[other_s], like))
            logp_t = scores.teacher_logps(_on(other_t, like), _on(written.teacher.ids[other_t], like))
        num_chunks = written.alignment.num_chunks
        return {
            "rest_s": summed(logp_s, chunk_s[other_s], chunks, num_chunks),
            "rest_t": summed(logp_t.detach(), chunk_t[other_t], chunks, num_chunks),
        }

    def __call__(self, logits_s: Tensor, logits_t: Tensor, **inputs: Tensor) -> Values:
        rest_s, rest_t = inputs["rest_s"][:, None], inputs["rest_t"][:, None]
        logp_s, logp_t = (at_least_float32(x).log_softmax(-1) for x in (logits_s, logits_t))
        in_s, in_t = with_stop(logp_s, self.matched_s, self.stop_s), with_stop(logp_t, self.matched_t, self.stop_t)
        with torch.no_grad():
            masses = {"mass_s": in_s.logsumexp(-1).exp(), "mass_t": in_t.logsumexp(-1).exp()}
        joint_s, joint_t = in_s + rest_s, in_t + rest_t
        if self.gold_as_shipped:
            joint_s, joint_t = joint_s.clamp_min(_TRL_FLOOR), joint_t.clamp_min(_TRL_FLOOR)
        matched = generalized_jsd(joint_s, joint_t, self.beta)
        unmatched = self._unmatched(logp_s, logp_t, rest_s, rest_t)
        parts = {"matched": matched.detach(), "unmatched": unmatched.detach()}
        return Values(self.weight_m * matched + self.weight_u * unmatched, {**parts, **masses})

    def _unmatched(self, logp_s: Tensor, logp_t: Tensor, rest_s: Tensor, rest_t: Tensor) -> Tensor:
        if self.gold_as_shipped and not (len(self.others_s) and len(self.others_t)):
            return logp_s.new_zeros(len(logp_s))  # TRL compares two sets of tokens or none
        return sorted_l1((logp_s[:, self.others_s] + rest_s).exp(), (logp_t[:, self.others_t] + rest_t).exp())

    def _read(self, written: Written) -> tuple[Ints, Ints, Ints]:
        """Which chunks are compared, `[R]`, and of every chunk the token of either side whose distribution is read,
        `[C]`."""
        alignment = written.alignment
        last_s = last_of_chunks(alignment.chunk_s, alignment.num_chunks)
        last_t = last_of_chunks(alignment.chunk_t, alignment.num_chunks)
        if not self.gold_as_shipped:
            return np.flatnonzero(alignment.chunk_exact), last_s, last_t
        followed = has_next(written.student.segment)[last_s] & has_next(written.teacher.segment)[last_t]
        return np.flatnonzero(alignment.chunk_exact & followed), written.first_s, written.first_t


def last_of_chunks(chunk: Ints, num_chunks: int) -> Ints:
    """Index of the last token of every chunk, `[C]`. Chunks ascend; tokens in none have -1."""
    inside = np.flatnonzero(chunk >= 0)
    return inside[np.searchsorted(chunk[inside], np.arange(num_chunks), side="right") - 1]


def has_next(segment: Ints) -> Bools:
    """Does another token of its segment follow each token, `[N]`?"""
    return np.append(segment[1:] == segment[:-1], np.zeros(min(len(segment), 1), np.bool_))


def other_tokens(chunk: Ints, read: Ints, chunks: Ints) -> Ints:
    """The tokens of `chunks` that are not `read`; `read [C]` is one token of every chunk."""
    other = np.isin(chunk, chunks)
    other[read] = False
    return np.flatnonzero(other)


def summed(logp: Tensor, chunk: Ints, chunks: Ints, num_chunks: int) -> Tensor:
    """Sum of `logp [Q]`, whose tokens lie in `chunk [Q]`, over each of `chunks`, `[R]`."""
    logp = at_least_float32(logp)
    return logp.new_zeros(num_chunks).index_add(0, _on(chunk, logp), logp)[_on(chunks, logp)]


def with_stop(logp: Tensor, ids: Tensor, stop: Tensor) -> Tensor:
    """The columns `ids`, and as one more the mass of `stop`, unless that is empty: `[R, K]` or `[R, K + 1]`."""
    columns = logp[:, ids]
    return torch.cat([columns, logp[:, stop].logsumexp(-1, keepdim=True)], dim=-1) if len(stop) else columns


def all_but(ids: Tensor, size: int) -> Tensor:
    """The ids below `size` that are not among `ids`, ascending."""
    left = torch.ones(size, dtype=torch.bool, device=ids.device)
    left[ids] = False
    return left.nonzero().squeeze(-1)


def late_logps(written: Written, other_s: Ints, other_t: Ints, scores: Scores) -> tuple[Tensor, Tensor]:
    """Log-probs of these tokens, each in the row that predicts the token after it: TRL's default reading."""
    like_s, like_t = scores.path.logp_s, scores.path.logp_t
    if not len(other_s) and not len(other_t):
        return like_s[:0], like_t[:0]
    logp_s = scores.student_logps(_on(other_s + 1, like_s), _on(written.student.ids[other_s], like_s))
    logp_t = scores.teacher_logps(_on(other_t + 1, like_t), _on(written.teacher.ids[other_t], like_t))
    return logp_s.clamp_min(_TRL_FLOOR), logp_t.clamp_min(_TRL_FLOOR)


def matched_strings(pair: Pair) -> tuple[Tensor, Tensor]:
    """Ids of the tokens that TRL holds to be the same: equal strings, special tokens included."""
    tables = pair.need_tables("gold")
    kinds = tables.student.kind, tables.teacher.kind
    if kinds != ("byte-level", "byte-level"):
        raise ConfigError(
            f"gold_as_shipped=True reproduces TRL, which takes byte-level tokenizers only; these are {kinds[0]} "
            f"(student) and {kinds[1]} (teacher). Use gold_as_shipped=False."
        )
    theirs = {name: i for i, name in tables.teacher.names.items()}
    special = [(i, theirs[name]) for i, name in tables.student.names.items() if name in theirs]
    both = torch.tensor(special, dtype=torch.int64, device=pair.shared_s.device).reshape(-1, 2)
    return torch.cat([pair.shared_s, both[:, 0]]), torch.cat([pair.shared_t, both[:, 1]])


def _is_count(weights: str | None, gold_as_shipped: bool) -> bool:
    """Are the two parts weighed by numbers of tokens?"""
    if weights not in (None, "mass", "count"):
        raise ConfigError(f"weights={weights!r} is unknown to objective 'gold': choose 'mass' or 'count'.")
    if gold_as_shipped and weights == "mass":
        raise ConfigError("weights='mass' is not what TRL ships: leave it out, or gold_as_shipped.")
    return gold_as_shipped or weights == "count"


def _on(index: Ints, like: Tensor) -> Tensor:
    return sent(torch.from_numpy(index), like.device)
