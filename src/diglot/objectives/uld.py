"""Sorted L1 between whole next-token distributions: what two models say, whatever it means."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from diglot.arrays import Ints
from diglot.batches import Written
from diglot.errors import ConfigError
from diglot.objectives.base import RowObjective, at_least_float32
from diglot.objectives.pair import Pair
from diglot.objectives.scores import Rows, Values


def sorted_l1(p: Tensor, q: Tensor) -> Tensor:
    """`sum_r |p'(r) - q'(r)|`, `[R]`, of masses `p [R, V]` and `q [R, W]`, each sorted downwards and zero-padded.

    `q` is a constant. Where two masses of one rank are equal the gradient is 0.
    """
    distance: Tensor = _SortedL1.apply(p, q)
    return distance


class _SortedL1(torch.autograd.Function):
    """Kept for the backward pass is one sign per mass: a byte, where autograd's sort would keep indices of eight.

    Only as many ranks as the narrower side has are sorted; what the wider side has beyond them stands against zero.
    """

    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor) -> Tensor:
        common = min(p.shape[-1], q.shape[-1])
        (mine, order), (theirs, _) = _largest(p, common), _largest(q, common)
        beyond = _sum_without(p, mine) + _sum_without(q, theirs)
        gap = mine - theirs
        if ctx.needs_input_grad[0]:
            sign = (p > 0).to(torch.int8)
            ctx.save_for_backward(sign.scatter_(-1, order, gap.sign().to(torch.int8)))
        return gap.abs_().sum(-1) + beyond

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (sign,) = ctx.saved_tensors
        return grad_output[:, None] * sign, None


def _largest(masses: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest entries of each row, downwards, and their places. Sorting whole rows takes far longer."""
    largest = masses.sort(dim=-1, descending=True) if count == masses.shape[-1] else masses.topk(count, dim=-1)
    return largest[0], largest[1]


def _sum_without(masses: Tensor, largest: Tensor) -> Tensor:
    """Sum of what is not among the largest, `[R]`; in float64, since it is the difference of two sums."""
    if largest.shape[-1] == masses.shape[-1]:
        return masses.new_zeros(len(masses))
    left = masses.sum(-1, dtype=torch.float64) - largest.sum(-1, dtype=torch.float64)
    return left.clamp(min=0).to(masses.dtype)


def pairs_by_index(segment_s: Ints, segment_t: Ints) -> tuple[Ints, Ints]:
    """Student and teacher tokens that have the same index in the same segment, `[R]` each.

    `segment_s [N_s]` and `segment_t [N_t]` ascend.
    """
    longest = max(len(segment_s), len(segment_t), 1)
    key_s, key_t = (s * longest + np.arange(len(s)) - np.searchsorted(s, s) for s in (segment_s, segment_t))
    _, at_s, at_t = np.intersect1d(key_s, key_t, assume_unique=True, return_indices=True)
    return at_s, at_t


class ULD(RowObjective):
    """Sorted L1 of the whole next-token distributions: `sum_r |p'(r) - q'(r)|`, the ULD loss without its
    cross-entropy term.

    Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss" (arXiv 2402.12030).
    p' and q' are the probabilities of student and teacher sorted downwards, the shorter one padded with zeros: a
    Wasserstein-1 distance whose cost is the same for any two different tokens. In [0, 2].

    `rows="pairs"`: the rows that predict the tokens of one-to-one pairs, where both sides speak about the same text.
    `rows="index"`, the paper's: the i-th token of a segment against the i-th of the other side, up to the shorter
    one's end; after the first token that the two sides cut differently they are about different places. Pairs with a
    token that is not comparable are left out.

    It is **not** a divergence on text. It sees spectra only, how sure each side is and not of what: zero whenever the
    sorted probabilities agree, even if the two sides expect disjoint texts. Stop is a token like any other. A wider
    vocabulary, whose mass is spread over more tokens, is pressed to be as peaked as the narrower one.
    """

    name = "uld"

    def __init__(self, pair: Pair, *, rows: str = "pairs") -> None:
        super().__init__(pair)
        if rows not in ("pairs", "index"):
            raise ConfigError(f"rows={rows!r} is unknown to objective 'uld': choose 'pairs' or 'index'.")
        self.by_index = rows == "index"

    def rows(self, written: Written) -> Rows:
        if not self.by_index:
            return super().rows(written)
        at_s, at_t = pairs_by_index(written.student.segment, written.teacher.segment)
        usable = written.student.exact[at_s] & written.teacher.exact[at_t]
        skipped = {"not_comparable": int((~usable).sum())}
        return Rows(torch.from_numpy(at_s[usable]), torch.from_numpy(at_t[usable]), skipped=skipped)

    def __call__(self, logits_s: Tensor, logits_t: Tensor, **inputs: Tensor) -> Values:
        return Values(sorted_l1(*(at_least_float32(x).softmax(-1) for x in (logits_s, logits_t))))
