"""tinker-cookbook: the reverse-KL advantage of its on-policy distillation, for a teacher with another tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from diglot.arrays import Floats
from diglot.engines.project import Projector
from diglot.engines.scores import TeacherScores
from diglot.engines.turns import TurnFinder


class TinkerTeacher:
    """A teacher's sampling client and the pair of tokenizers.

    Args:
        client: a tinker `SamplingClient` of the teacher.
        model_input: `tinker.ModelInput.from_ints`, which makes the input of ids.
    """

    def __init__(self, projector: Projector, client: Any, model_input: Any) -> None:
        self.projector, self.client, self.model_input = projector, client, model_input
        self.finder = TurnFinder(projector.student)

    async def logps(self, ids: Sequence[int], student: Floats) -> Floats:
        """The teacher's log-prob of each of the student's ids `[n]`; the student's own where it says nothing."""
        reading = self.projector.read(self.finder.find(ids))
        result = await self.client.compute_logprobs_async(self.model_input(reading.teacher_ids.tolist()))
        scores = TeacherScores.of([0.0, *result[1:]])  # the first has none
        return self.projector.project(reading, scores, credit="gap", student_logps=student).filled(student)


async def incorporate_kl_penalty(
    data: Sequence[Any], teachers: Sequence[TinkerTeacher], tensor_data: Any, kl_penalty_coef: float = 1.0
) -> dict[str, float]:
    """Add `-coef * (log p_student - log p_teacher)` to the advantages of what was sampled, in place.

    Args:
        data: datums with `model_input` and `loss_fn_inputs` target_tokens, logprobs, mask and advantages, as
            `assemble_training_data` makes them: target `t` follows input `t`.
        teachers: one for each datum.
        tensor_data: `tinker.TensorData.from_torch`.

    Returns:
        `teacher_kl`, the mean difference over sampled tokens, in nats.
    """
    import torch

    async def difference(datum: Any, teacher: TinkerTeacher) -> Any:
        inputs = datum.loss_fn_inputs
        ids = [*datum.model_input.to_ints(), int(inputs["target_tokens"].to_torch()[-1])]
        own = inputs["logprobs"].to_torch().double()
        result = await teacher.logps(ids, np.append(0.0, own.numpy()))
        return torch.where(inputs["mask"].to_torch() > 0, own - torch.from_numpy(result[1:]), 0.0)  # NaN * 0 is NaN

    result = await asyncio.gather(*(difference(*one) for one in zip(data, teachers, strict=True)))
    count = sum(float((datum.loss_fn_inputs["mask"].to_torch() > 0).sum()) for datum in data)
    for datum, gap in zip(data, result, strict=True):
        advantages = datum.loss_fn_inputs["advantages"].to_torch()
        datum.loss_fn_inputs["advantages"] = tensor_data(advantages - kl_penalty_coef * gap.to(advantages.dtype))
    return {"teacher_kl": sum(float(gap.sum()) for gap in result) / max(count, 1.0)}
