"""Teacher-mixed sampling for equal vocabularies (MiniLLM, arXiv 2306.08543, section 2.2).

Every token is drawn from `alpha * teacher + (1 - alpha) * student`. It keeps the student from wandering into text
that a reverse KL rewards but nobody would write, and is corrected by an importance weight at training time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from diglot.arrays import Ids
from diglot.heads import cache_argument
from diglot.rollouts.sampler import pad_left


class TeacherMixture(LogitsProcessor):
    """Replaces the student's scores by the log of the mixture. Good for one call of `generate`.

    The teacher reads its own prompt, then the ids that were sampled, with a key-value cache of its own.

    Args:
        teacher: a model with the student's vocabulary.
        prompts: the teacher's own prompts, one for each row.
        alpha: share of the teacher, in (0, 1).
        running: gives it ready to be run, where that takes more than calling it.
        stops: the ids that end a turn, of student and teacher. Where they differ, the teacher's mass of its whole set
            goes to the student's first: the mixture stops as often as both do.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        prompts: Sequence[Ids],
        pad_id: int,
        alpha: float,
        running: Callable[[], AbstractContextManager[PreTrainedModel]] | None = None,
        stops: tuple[Sequence[int], Sequence[int]] = ((), ()),
    ) -> None:
        self._stops = stops
        self._running = running or (lambda: nullcontext(teacher))
        self._log_shares = math.log(alpha), math.log1p(-alpha)
        self._next_ids, self._mask = pad_left(prompts, pad_id, teacher.device)
        self._cache: object | None = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._cache is not None:
            self._next_ids = input_ids[:, -1:].to(self._mask.device)
            self._mask = torch.cat([self._mask, torch.ones_like(self._next_ids)], dim=1)
        positions = self._mask.cumsum(1).sub(1).clamp(min=0)[:, -self._next_ids.shape[1] :]
        with self._running() as model:
            name = cache_argument(model)
            out = model(
                input_ids=self._next_ids,
                attention_mask=self._mask,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **{name: self._cache},
            )
        self._cache = getattr(out, name)
        width = min(scores.shape[-1], out.logits.shape[-1])  # embedding padding may differ
        teacher = torch.full_like(scores, -torch.inf, dtype=torch.float32)
        teacher[:, :width] = out.logits[:, -1, :width].to(teacher).log_softmax(-1)
        if set(self._stops[0]) != set(self._stops[1]):
            teacher = _stopping_as(teacher, *map(list, self._stops))
        log_teacher, log_student = self._log_shares
        return torch.logaddexp(teacher + log_teacher, scores.float().log_softmax(-1) + log_student).to(scores.dtype)


def _stopping_as(logps: Tensor, student: list[int], teacher: list[int]) -> Tensor:
    """A teacher's log-probs `[B, V]` with its mass on stop at the student's first stop id.

    What the teacher gives to an id that ends the student's turn and not its own is left out: it would end a text that
    the teacher goes on with.
    """
    stop = logps[:, teacher].logsumexp(-1)
    moved = logps.index_fill(-1, torch.tensor([*student, *teacher], device=logps.device), -torch.inf)
    moved[:, student[0]] = stop
    return moved.log_softmax(-1)
