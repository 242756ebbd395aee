"""Training from scores that were kept: what can be asked of them, and the loss from next-byte distributions."""

from __future__ import annotations

from typing import Any

import torch

from diglot.errors import ConfigError
from diglot.objectives import SummaryObjective, Values
from diglot.objectives.byte import ByteDistribution
from diglot.teachers.kept import is_scores
from diglot.teachers.scored import ScoredTeacher
from diglot.trainers.config import DistillationConfig
from diglot.trainers.served import ServedScores


def kept_teacher(teacher: Any, tokenizer: Any, args: DistillationConfig) -> ScoredTeacher | None:
    """The folder of scores that the options name; None if they name none.

    Raises:
        ConfigError: the run would write texts of its own, which nobody has scored.
        TeacherError: the scores are unfinished, or were made otherwise than they are to be read.
    """
    name = args.name_of(teacher)
    if not is_scores(name):
        return None
    if getattr(args, "lmbda", 1.0) > 0 or getattr(args, "seq_kd", False):
        raise ConfigError(
            f"{name} holds scores of fixed texts, and this run would write its own (lmbda="
            f"{getattr(args, 'lmbda', 'none: MiniLLM')}, seq_kd={getattr(args, 'seq_kd', False)}). Train GKD with "
            "lmbda=0 and without seq_kd, or name the teacher itself."
        )
    if args.teacher_model_init_kwargs:
        raise ConfigError(f"teacher_model_init_kwargs is for weights, and {name} holds scores only. Drop it.")
    if tokenizer is None and args.teacher_tokenizer_name_or_path:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            args.teacher_tokenizer_name_or_path,
            revision=args.teacher_model_revision,
            trust_remote_code=args.teacher_trust_remote_code,
        )
    reading = {
        "score_turns": args.score_turns,
        "system_prompt": args.teacher_system_prompt,
        "max_length": args.teacher_max_length,
        "template_kwargs": args.teacher_chat_template_kwargs,
    }
    return ScoredTeacher(str(name), tokenizer, reading)


class ScoredBatch(ServedScores):
    """`ServedScores` that may hold next-byte distributions as well."""

    def _summarised(self, objective: SummaryObjective, plan: Any) -> Values:
        if not isinstance(objective, ByteDistribution) or self.temperature != 1.0:
            raise ConfigError(
                f"kd_temperature={self.temperature} needs whole rows of the teacher, and its next-byte "
                "distributions were kept "
                "at temperature 1. Leave kd_temperature at 1."
            )
        of_student = self.summarised_student(objective, plan)
        distribution: torch.Tensor = self.said.distributions(plan.segment, plan.position)  # type: ignore[attr-defined]
        return objective.against(of_student, distribution.to(of_student.device), plan)
