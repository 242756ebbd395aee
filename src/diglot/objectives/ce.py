"""Cross-entropy of a reference text."""

from __future__ import annotations

import torch
from torch import Tensor

from diglot.alignment import Alignment
from diglot.batches import Written
from diglot.batches.sending import sent
from diglot.objectives.base import Mask, PathObjective, at_least_float32
from diglot.objectives.scores import Metrics, Path, Scores, Values


class CrossEntropy(PathObjective):
    """`-log p_student` in nats of every token of the scored segments, stop included. Asks nothing of the teacher.

    Whether the teacher could read a token plays no part; tokens of a role that is not scored are left out.

    For text that is to be imitated; on the student's own samples it only sharpens what the student does already.
    """

    name = "ce"

    def mask(self, alignment: Alignment[Tensor]) -> Tensor:
        """All student tokens, `[N_s]`."""
        return torch.ones_like(alignment.chunk_s, dtype=torch.bool)

    def plan(self, written: Written) -> Mask:
        every = torch.ones(len(written.student.ids), dtype=torch.bool)
        return Mask(every if written.left_out is None else torch.from_numpy(~written.left_out))

    def loss(self, plan: Mask, scores: Scores, share: float) -> tuple[Tensor, Metrics]:
        values, _ = self(self.path(scores), scores.alignment)
        losses = values.loss[sent(plan.mask.nonzero()[:, 0], values.loss.device)]
        return share * losses.sum(), {"loss": losses}

    def path(self, scores: Scores) -> Path:
        logp_s = scores.student_text(1.0)
        return Path(logp_s, logp_s.new_zeros(0))

    def __call__(self, path: Path, alignment: Alignment[Tensor]) -> tuple[Values, Tensor]:
        return Values(-at_least_float32(path.logp_s)), self.mask(alignment)
