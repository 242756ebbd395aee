"""Random draws of a row that depend on its own seed only: not on the batch, the device or the number of processes."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from diglot.batches.sending import sent
from diglot.sums import running_sums

_BELOW_ONE = 1 - 2.0**-48  # a draw times a total then stays below the total


class RowDraws(LogitsProcessor):
    """Leaves each row one token, drawn from its scores by inverting their distribution function in float64.

    One uniform number per row and token, made on the host. Good for one call of `generate`.

    Args:
        seeds: one for each row.
        prompt_width: length of the padded prompts.
        max_new_tokens: how many tokens are drawn at most.
    """

    def __init__(self, seeds: Sequence[int], prompt_width: int, max_new_tokens: int) -> None:
        draws = np.stack([np.random.default_rng(seed).random(max_new_tokens) for seed in seeds])
        self._draws, self._start = torch.from_numpy(draws * _BELOW_ONE), prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._draws = sent(self._draws, scores.device)  # those of the whole completion, at its first token
        draw = self._draws[:, input_ids.shape[1] - self._start, None]
        below = running_sums(scores.float().softmax(-1).double(), overwrite=True)
        # Strictly above: a token without probability leaves the sum where it was and is never found.
        token = torch.searchsorted(below, draw * below[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


class Nucleus(LogitsProcessor):
    """Leaves the fewest likeliest tokens of each row whose mass reaches `top_p`, in (0, 1).

    What `TopPLogitsWarper` of transformers does, with sums that have an order on CUDA too (`full_determinism`).
    """

    def __init__(self, top_p: float) -> None:
        self.top_p = top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ascending, order = scores.sort(-1)
        beside = running_sums(ascending.softmax(-1)) <= 1 - self.top_p
        beside[:, -1] = False
        return scores.masked_fill(beside.scatter(1, order, beside), -torch.inf)


def seeds_of_rows(seed: int | Sequence[int], rows: int) -> list[int]:
    """`seed` itself if it is one for each row, else one for each row that follows from it and the row's place."""
    if not isinstance(seed, int):
        return list(seed)
    return [random.Random(f"{seed}/{row}").getrandbits(63) for row in range(rows)]
