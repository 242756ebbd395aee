"""verl: its teacher manager and a distillation loss, for a teacher with another tokenizer.

A module of your own, named as `actor_rollout_ref.model.external_lib` so that every worker imports it:

    from diglot.engines.plugins.verl import install

    install(student="Qwen/Qwen3-1.7B", teacher="google/gemma-3-4b-it")

and `distillation.distillation_loss.loss_mode=diglot_k1`. The teacher is started and asked by verl itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from diglot.engines.project import Projector
from diglot.engines.scores import TeacherScores
from diglot.engines.turns import TurnFinder
from diglot.errors import ConfigError, TeacherError
from diglot.vocabulary import load_tokenizer

LOSS = "diglot_k1"


def install(student: str, teacher: str) -> None:
    """Put the manager into verl's module, from which agent loops import it when they start, and register the loss.

    Args:
        student: where the student's tokenizer and template are.
        teacher: the same of the teacher.
    """
    from verl.experimental.teacher_loop import teacher_manager
    from verl.trainer.distillation import losses
    from verl.utils.metric import AggregationType, Metric
    from verl.workers.utils.padding import no_padding_2_padding

    projector = Projector(load_tokenizer(student), load_tokenizer(teacher))
    manager = teacher_manager.AsyncTeacherLLMServerManager
    teacher_manager.AsyncTeacherLLMServerManager = cross_tokenizer(manager, projector)
    settings = losses.DistillationLossSettings(names=[LOSS], use_estimator=True)
    mean = AggregationType.MEAN
    losses.register_distillation_loss(settings)(make_loss(no_padding_2_padding, lambda value: Metric(mean, value)))


def cross_tokenizer(manager: type, projector: Projector) -> type:
    """A subclass of verl's `AsyncTeacherLLMServerManager` whose teacher reads its own rendering."""
    finder = TurnFinder(projector.student)

    class CrossTokenizerTeacher(manager):  # type: ignore[misc]
        async def compute_teacher_logprobs_single(
            self, sequence_ids: list[int], multi_modal_data: Any = None, **more: Any
        ) -> tuple[Any, Any]:
            """Ids and log-probs `[S, 1]`; row `t` is about id `t + 1`, as verl has it. NaN where nothing is known."""
            import torch

            if multi_modal_data:
                raise ConfigError("A teacher with another tokenizer reads text alone, and a sample has other data.")
            reading = projector.read(finder.find(sequence_ids))
            ids, logps = await super().compute_teacher_logprobs_single(
                sequence_ids=reading.teacher_ids.tolist(), **more
            )
            scores = _own_scores(ids.numpy(), logps.double().numpy(), reading.teacher_ids)
            projected = projector.project(reading, scores)
            following = np.append(sequence_ids[1:], sequence_ids[-1])
            own = np.append(projected.logps[1:], np.nan)
            return (
                torch.from_numpy(following)[:, None].to(torch.int32),
                torch.from_numpy(own)[:, None].to(torch.float32),
            )

    return CrossTokenizerTeacher


def _own_scores(ids: Any, logps: Any, teacher_ids: Any) -> TeacherScores:
    """verl's rows of the teacher's reading as scores."""
    if ids.ndim != 2 or ids.shape[1] != 1:
        raise ConfigError(
            f"verl gives {ids.shape[1:]} teacher ids a row, expected 1: choose loss_mode={LOSS} (use_estimator)."
        )
    if len(ids) != len(teacher_ids) or logps.shape != ids.shape:
        raise TeacherError(
            f"verl's teacher gives ids of shape {ids.shape} and log-probs of shape {logps.shape} for a text of "
            f"{len(teacher_ids)} tokens, expected [{len(teacher_ids)}, 1] of both. Its rows stand elsewhere in this "
            "version of verl."
        )
    wrong = np.flatnonzero(ids[:-1, 0] != teacher_ids[1:])
    if len(wrong):
        at = int(wrong[0])
        raise TeacherError(
            f"Row {at} of verl's teacher is about id {ids[at, 0]}, expected id {teacher_ids[at + 1]} that follows "
            "there. Its rows stand elsewhere in this version of verl."
        )
    return TeacherScores.of(np.append(0.0, logps[:-1, 0]))


def make_loss(no_padding_2_padding: Any, metric: Any) -> Any:
    """verl's "k1", and no loss where the teacher says nothing; `use_policy_gradient` takes its negative as reward."""

    def diglot_k1(config: Any, distillation_config: Any, model_output: Any, data: Any) -> tuple[Any, dict[str, Any]]:
        import torch

        student = no_padding_2_padding(model_output["log_probs"], data)
        teacher = no_padding_2_padding(data["teacher_logprobs"], data).squeeze(-1)
        mask = data["response_mask"]
        mask = (mask.to_padded_tensor(0) if mask.is_nested else mask).bool()
        known = torch.isfinite(teacher)
        losses = torch.where(known, student - teacher.masked_fill(~known, 0.0), 0.0)
        scored, count = known & mask, mask.sum().clamp(min=1)  # a micro-batch may have no response at all
        return losses, {
            "distillation/abs_loss": metric(losses.detach()[mask].abs().sum() / count),
            "distillation/coverage": metric(scored.sum() / count),
        }

    return diglot_k1
