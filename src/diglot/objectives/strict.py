"""Divergence on the tokens that both vocabularies have, and stop, at the rows where both sides agree on the token."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from diglot.errors import ConfigError
from diglot.objectives.base import ColumnObjective, at_least_float32, check_range
from diglot.objectives.divergences import generalized_jsd
from diglot.objectives.levels import Level
from diglot.objectives.masses import FLOOR, no_text
from diglot.objectives.pair import Pair
from diglot.objectives.scores import Values


def chosen_columns(logits_s: Tensor, pair: Pair, top_k: int | None) -> tuple[Tensor, Tensor]:
    """Ids `[R, k]` on the student's and the teacher's side: the student's `top_k` likeliest shared tokens per row.

    0 or None: all shared tokens. The choice is a constant: no gradient passes through it.
    """
    if not top_k or top_k >= len(pair.shared_s):
        rows = (len(logits_s), -1)
        return pair.shared_s.expand(rows), pair.shared_t.expand(rows)
    with torch.no_grad():
        best = logits_s[:, pair.shared_s].topk(top_k, dim=-1, sorted=False).indices
    return pair.shared_s[best], pair.shared_t[best]


def with_stop(logits: Tensor, columns: Tensor, stop_ids: Tensor) -> Tensor:
    """The chosen columns' logits, and as one more column the stop set's: `[R, k + 1]`."""
    return torch.cat([logits.gather(-1, columns), logits[:, stop_ids].logsumexp(-1, keepdim=True)], dim=-1)


def rest(logits: Tensor, columns: Tensor, stop_ids: Tensor) -> Tensor:
    """Log-sum-exp over all other columns, `[R, 1]`; -inf if there are none. Stable, unlike `log(1 - chosen mass)`."""
    others = logits.scatter(-1, columns, -math.inf).index_fill(-1, stop_ids, -math.inf)
    return others.logsumexp(-1, keepdim=True)


def _others(logits: Tensor, columns: Tensor, stop_ids: Tensor, silent: Tensor, apart: bool) -> Tensor:
    """What is not chosen: the rest, and before it, where it is `apart`, the mass of `silent`; then at least 1e-8 each.

    One side may have no such token at all, which would make a KL divergence infinite.
    """
    left = rest(logits, columns, torch.cat([stop_ids, silent]))
    if not apart:
        return left
    both = torch.cat([logits[:, silent].logsumexp(-1, keepdim=True), left], dim=-1)
    return torch.logaddexp(both, logits.logsumexp(-1, keepdim=True) + math.log(FLOOR))


def strict_divergence(
    logits_s: Tensor,
    logits_t: Tensor,
    pair: Pair,
    *,
    top_k: int | None = 16,
    beta: float = 1.0,
    residual: bool = False,
    silent: tuple[Tensor, Tensor] | None = None,
) -> Values:
    """Generalised JSD in nats, `[R]`, on the student's `top_k` likeliest shared tokens and one semantic stop column.

    `logits_s` is `[R, V_s]`, `logits_t` `[R, V_t]`. The stop column is the sum of the mass of each side's stop set.
    Both sides are renormalised on the chosen columns: the divergence of the distributions *given* that one of them
    comes next.
    With `residual`, one more bin holds each side's remaining mass instead: a proper divergence of coarsened
    distributions. Of that bin, the mass of `silent` ids of each side, control tokens that do not stop, is a bin of its
    own if the student has any: else it could take the place of text that the teacher alone has.
    Metrics: `mass_s`, `mass_t`, each side's probability of the chosen columns, in [0, 1].
    """
    logits_s, logits_t = at_least_float32(logits_s), at_least_float32(logits_t)
    columns_s, columns_t = chosen_columns(logits_s, pair, top_k)
    chosen_s, chosen_t = with_stop(logits_s, columns_s, pair.stop_s), with_stop(logits_t, columns_t, pair.stop_t)
    with torch.no_grad():
        mass_s = (chosen_s.logsumexp(-1) - logits_s.logsumexp(-1)).exp()
        mass_t = (chosen_t.logsumexp(-1) - logits_t.logsumexp(-1)).exp()
    if residual:
        apart = silent is not None and len(silent[0]) > 0
        silent_s, silent_t = silent if silent is not None and apart else (pair.stop_s[:0], pair.stop_t[:0])
        others = (
            _others(logits, columns, stop, ids, apart)
            for logits, columns, stop, ids in (
                (logits_s, columns_s, pair.stop_s, silent_s),
                (logits_t, columns_t, pair.stop_t, silent_t),
            )
        )
        chosen_s, chosen_t = (torch.cat(x, -1) for x in zip((chosen_s, chosen_t), others, strict=True))
    loss = generalized_jsd(chosen_s.log_softmax(-1), chosen_t.log_softmax(-1), beta)
    return Values(loss, {"mass_s": mass_s, "mass_t": mass_t})


class Strict(ColumnObjective):
    """`strict_divergence` on the rows of one-to-one pairs; by default the reverse KL(student || teacher).

    Sees `top_k` alternatives to what was written; is blind to text that the two sides cut differently, and, unless
    `residual`, to mass outside the chosen columns. Both shares are reported.
    """

    name = "strict"
    needs = Level.CHOSEN  # in its default form

    def __init__(self, pair: Pair, *, top_k: int | None = 16, beta: float = 1.0, residual: bool = False) -> None:
        super().__init__(pair)
        check_range("beta", beta, 0.0, 1.0)
        if top_k is not None and top_k < 0:
            raise ConfigError(f"top_k={top_k} is negative: choose 0 for all {len(pair.shared_s)} shared tokens.")
        check_columns(pair)
        all_chosen = not top_k or top_k >= len(pair.shared_s)
        if residual and beta == 0 and all_chosen and len(pair.shared_s) + len(pair.stop_s) >= pair.size_s:
            raise ConfigError(
                "residual=True with beta=0 is infinite here: the chosen columns are the student's whole vocabulary of "
                f"{pair.size_s}, so its residual bin is empty, the teacher's is not. Choose beta > 0 or top_k > 0."
            )
        self.top_k, self.beta, self.residual = top_k, beta, residual
        self.silent_s, self.silent_t = no_text(pair)
        if not self.reads_few:
            self.needs = Level.HIDDEN

    def __call__(self, logits_s: Tensor, logits_t: Tensor, **inputs: Tensor) -> Values:
        options: dict[str, Any] = dict(top_k=self.top_k, beta=self.beta, residual=self.residual)
        silent = self.silent_s, self.silent_t
        return strict_divergence(logits_s, logits_t, self.pair, silent=silent, **options)

    @property
    def reads_few(self) -> bool:
        """A top-k without a residual bin is all that is read of either side."""
        return bool(self.top_k) and not self.residual

    def choose(self, logits_s: Tensor) -> tuple[Tensor, Tensor]:
        """The student's likeliest shared tokens, then each side's whole stop set."""
        chosen = chosen_columns(logits_s, self.pair, self.top_k)
        stops = self.pair.stop_s, self.pair.stop_t
        columns = [torch.cat([c, s.expand(len(c), -1)], dim=-1) for c, s in zip(chosen, stops, strict=True)]
        return columns[0], columns[1]

    def compare(self, chosen_s: Tensor, chosen_t: Tensor) -> Tensor:
        logp_s, logp_t = (
            _folded(chosen, len(stop)).log_softmax(-1)
            for chosen, stop in ((chosen_s, self.pair.stop_s), (chosen_t, self.pair.stop_t))
        )
        return generalized_jsd(logp_s, logp_t, self.beta)


def _folded(chosen: Tensor, stops: int) -> Tensor:
    """The last `stops` columns as one, `[R, k + 1]`."""
    return torch.cat([chosen[:, :-stops], chosen[:, -stops:].logsumexp(-1, keepdim=True)], dim=-1)


def check_columns(pair: Pair) -> None:
    """Raise `ConfigError` unless both sides have stop ids, and none of them is a shared text token."""
    for side, stop, shared in (("student", pair.stop_s, pair.shared_s), ("teacher", pair.stop_t, pair.shared_t)):
        if not len(stop):
            raise ConfigError(f"the {side} has an empty stop set, expected at least one id: name its stop token.")
        both = stop[torch.isin(stop, shared)].tolist()
        if both:
            raise ConfigError(
                f"ids {both} are in the {side}'s stop set {stop.tolist()} and among its shared text tokens: their mass "
                "would count twice. A stop id must be a control token."
            )
