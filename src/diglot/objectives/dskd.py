"""Dual-space distillation: hidden states projected into the other model's space and read by its own head.

(DSKD, arXiv 2406.17328; with exact-token alignment and projectors from the shared tokens, arXiv 2504.11426.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diglot.batches import Written
from diglot.errors import ConfigError
from diglot.objectives.base import ProjectedObjective, at_least_float32
from diglot.objectives.divergences import kl
from diglot.objectives.pair import Pair
from diglot.objectives.scores import Part, Rows, Values


class DSKD(ProjectedObjective):
    """Three parts on the rows of one-to-one pairs, in nats per row, added up.

    With `h` hidden states, `U` output embeddings, `P` the projectors, `y` the written student token:

    - student space: `q' = softmax(U_s P_ts h_t)`; `KL(q' || p)` where the likeliest token of `q'` is `y`, `q'`
      constant;
    - the projector: `-log q'(y)`, whose gradient goes to `P_ts` alone;
    - teacher space: `p' = softmax(U_t P_st h_s)`; `KL(q || p')`, whose gradient goes to `P_st` and the student.

    The gradient never reaches an output embedding through a projection. Zero of the sum says nothing about the
    distributions themselves: what is compared has gone through a trained map. Shared tokens give the map its start:
    the logits of shared tokens are kept as well as a linear map can (least squares on `U_t P = U_s` over them).
    """

    name = "dskd"

    def __init__(self, pair: Pair, *, ridge: float = 1e-4) -> None:
        super().__init__(pair)
        if not len(pair.shared_s):
            raise ConfigError("objective 'dskd' starts from shared tokens, and the two vocabularies have none.")
        if ridge <= 0:
            raise ConfigError(f"ridge={ridge} cannot stabilise least squares: choose a value above 0, such as 1e-4.")
        self.ridge = ridge

    def prepare(self, weight_s: Tensor, weight_t: Tensor) -> None:
        """Least-squares projectors: `t_to_s` `[H_t, H_s]` and `s_to_t` `[H_s, H_t]`, float32."""
        shared_s = weight_s.detach()[self.pair.shared_s.to(weight_s.device)].double().cpu()
        shared_t = weight_t.detach()[self.pair.shared_t.to(weight_t.device)].double().cpu()
        t_to_s, s_to_t = least_squares(shared_t, shared_s, self.ridge), least_squares(shared_s, shared_t, self.ridge)
        self.projectors = nn.ParameterDict(
            {"t_to_s": nn.Parameter(t_to_s.to(weight_s.device)), "s_to_t": nn.Parameter(s_to_t.to(weight_s.device))}
        )

    def rows(self, written: Written) -> Rows:
        """One-to-one pairs, with the written student token."""
        alignment = written.alignment
        label = torch.from_numpy(written.student.ids[alignment.pair_s])
        return Rows(torch.from_numpy(alignment.pair_s), torch.from_numpy(alignment.pair_t), {"label": label})

    def parts(self, rows: Rows, hidden_s: Tensor, hidden_t: Tensor) -> list[Part]:
        if not self.projectors:
            raise ConfigError("The projectors are not made yet: call prepare(weight_s, weight_t) first.")
        of_teacher = _projected(hidden_t.to(hidden_s.device), self.projectors["t_to_s"])
        of_student = _projected(hidden_s, self.projectors["s_to_t"])
        s, t, inputs = rows.student, rows.teacher, rows.inputs
        return [
            Part("student_space", student_space, hidden_s, "student", of_teacher.detach(), "student", s, t, inputs),
            Part("projector", surprisal, of_teacher, "frozen_student", None, "student", t, t, inputs),
            Part("teacher_space", teacher_space, of_student, "teacher", hidden_t, "teacher", s, t, inputs),
        ]


def _projected(hidden: Tensor, projector: Tensor) -> Tensor:
    hidden = at_least_float32(hidden)
    return hidden @ projector.to(hidden.dtype)


def student_space(logits_s: Tensor, logits_q: Tensor, label: Tensor) -> Values:
    """`KL(q' || p)` where `q'` finds the written token, else 0, `[R]`."""
    logq = at_least_float32(logits_q).log_softmax(-1)
    right = logq.argmax(-1) == label
    loss = kl(logq, at_least_float32(logits_s).log_softmax(-1))
    return Values(torch.where(right, loss, 0.0), {"projected_right": right.to(loss.dtype)})


def surprisal(logits: Tensor, _: None, label: Tensor) -> Values:
    """`-log q'(label)`, `[R]`."""
    return Values(nn.functional.cross_entropy(at_least_float32(logits), label, reduction="none"))


def teacher_space(logits_p: Tensor, logits_t: Tensor, label: Tensor) -> Values:
    """`KL(q || p')`, `[R]`."""
    return Values(kl(at_least_float32(logits_t).log_softmax(-1), at_least_float32(logits_p).log_softmax(-1)))


def least_squares(source: Tensor, target: Tensor, ridge: float) -> Tensor:
    """`P` `[H_a, H_b]` so that the logits `U_b (P^T h)` of shared tokens are near `U_a h`, for `U_a [K, H_a]`, `U_b`.

    `P = U_a^T U_b (U_b^T U_b + ridge * mean diagonal)^-1`, float32.
    """
    gram = target.T @ target
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    projector: Tensor = torch.linalg.solve(gram, target.T @ source).T.float().contiguous()
    return projector
