"""Real texts through two tokenizers of the zoo, with random logits for every scored token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import support.tokenizers_zoo as zoo
import torch
from torch import Tensor

from diglot.batches import AlignedBatch, PairReader, align_pairs
from diglot.data import Sample
from diglot.objectives import Pair, Path, PathObjective, RowObjective, SummaryObjective, Values, make_objective
from diglot.objectives.base import at_least_float32
from diglot.rendering import Conversation, Renderer

TEXTS = (
    "The river had been rising.",
    "def add(a, b):\n    return a + b\n",
    "naïve café 数学, as you asked",
    "x",
    " 12 345 ",
)


@lru_cache
def renderer(name: str) -> Renderer:
    """A renderer of the zoo."""
    return Renderer(zoo.ALL[name](), name=name)


@lru_cache
def pair(student: str, teacher: str) -> Pair:
    """The pair of two tokenizers of the zoo."""
    s, t = renderer(student), renderer(teacher)
    return Pair.of(s.vocabulary, t.vocabulary, s.stop_ids, t.stop_ids, s.encoder.spell, t.encoder.spell)


def read(student: str, teacher: str, texts: Sequence[str] = TEXTS) -> AlignedBatch:
    """The texts as replies, read by both sides."""
    s, t = renderer(student), renderer(teacher)
    reader = PairReader(s, t, same_vocabulary=False)
    pairs = [reader.written(Sample(Conversation(None, "Say:"), text, "test")) for text in texts]
    return align_pairs(pairs, pad_s=s.stop_id, pad_t=t.stop_id, on_policy=False)


@dataclass
class Scored:
    """A batch and logits of the row that predicts each scored token."""

    pair: Pair
    batch: AlignedBatch
    logits_s: Tensor  # [N_s, V_s], requires grad
    logits_t: Tensor  # [N_t, V_t]

    @classmethod
    def of(
        cls,
        student: str,
        teacher: str,
        texts: Sequence[str] = TEXTS,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        spread: float = 2.0,
    ) -> Scored:
        """Random logits; with the same seed the same ones."""
        made, batch = pair(student, teacher), read(student, teacher, texts)
        draw = torch.Generator().manual_seed(seed)
        logits_s = torch.randn(len(batch.written.student.ids), made.size_s, generator=draw, dtype=torch.float64)
        logits_t = torch.randn(len(batch.written.teacher.ids), made.size_t, generator=draw, dtype=torch.float64)
        return cls(made, batch, (logits_s * spread).to(dtype).requires_grad_(), (logits_t * spread).to(dtype))

    @property
    def path(self) -> Path:
        """Log-probs of the written tokens under the logits."""
        written = self.batch.written
        return Path(
            _logps(self.logits_s, written.student, self.pair.stop_s),
            _logps(self.logits_t, written.teacher, self.pair.stop_t),
        )

    def student_logps(self, token: Tensor, ids: Tensor) -> Tensor:
        return self.logits_s.log_softmax(-1)[token, ids]

    def teacher_logps(self, token: Tensor, ids: Tensor) -> Tensor:
        return self.logits_t.log_softmax(-1)[token, ids]

    def teacher_ranges(self, token: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """What a `Teller` is asked for."""
        order = torch.from_numpy(self.pair.need_tables("test").teacher.trie.sorted_ids)
        rows = self.logits_t.log_softmax(-1)[:, order]
        sums = [rows[j, a:b].logsumexp(-1) for j, a, b in zip(token.tolist(), low.tolist(), high.tolist(), strict=True)]
        return torch.stack(sums) if sums else self.logits_t.new_zeros(0)

    def teacher_top(self, token: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """What a `Teller` is asked for."""
        best = at_least_float32(self.logits_t)[token].log_softmax(-1).topk(k)
        return best.indices, best.values

    def values(self, name: str, **options: Any) -> Values:
        """The objective's values, of those items alone that count."""
        return self.of_objective(make_objective(name, self.pair, **options))

    def of_objective(self, objective: Any) -> Values:
        """The same of a made objective."""
        if isinstance(objective, PathObjective):
            values, mask = objective(self.path, self.batch.alignment)
            return Values(values.loss[mask], {k: v[mask] for k, v in values.metrics.items()})
        if isinstance(objective, SummaryObjective):
            plan = objective.plan(self.batch.written)
            whole_s, whole_t = slice(0, len(self.logits_s)), slice(0, len(self.logits_t))
            return objective(
                objective.summary_s(plan)(self.logits_s, whole_s),
                objective.summary_t(plan)(self.logits_t, whole_t),
                plan,
            )
        assert isinstance(objective, RowObjective)
        rows, inputs = self.rows_and_inputs(objective)
        return objective(self.logits_s[rows.student], self.logits_t[rows.teacher], **inputs)

    def rows_and_inputs(self, objective: RowObjective) -> tuple[Any, dict[str, Tensor]]:
        """The rows of a row objective and the inputs that it gets of them."""
        rows = objective.rows(self.batch.written)
        return rows, {**rows.inputs, **objective.extra(rows, self.batch.written, self)}

    def gradient(self, loss: Tensor) -> Tensor:
        """Of the student's logits."""
        return torch.autograd.grad(loss.sum(), self.logits_s)[0]


def _logps(logits: Tensor, side: Any, stop_ids: Tensor) -> Tensor:
    logp = logits.log_softmax(-1)
    ids, stop = torch.from_numpy(side.ids), torch.from_numpy(side.stop)
    return torch.where(stop, logp[:, stop_ids].logsumexp(-1), logp.gather(-1, ids[:, None]).squeeze(-1))
