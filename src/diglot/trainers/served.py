"""A loss from what a served teacher gives: log-probs of the text, and the likeliest ids of each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diglot.errors import ConfigError
from diglot.objectives import Level, PathObjective
from diglot.objectives.top_k import TopK
from diglot.teachers import Teacher
from diglot.trainers.terms import BatchScores, Term

if TYPE_CHECKING:  # it needs packages that not everyone has
    from diglot.teachers.served import TextScores


class ServedScores(BatchScores):
    """`BatchScores` of a teacher that gives no hidden states. What is not among its answers cannot be asked."""

    def __init__(self, said: TextScores, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.said = said

    def _teacher_text(self, temperature: float) -> Tensor:
        _check_temperature(temperature, "the log-probs of the text")
        return self.said.text(self.stop_as_set)

    @torch.no_grad()
    def teacher_top(self, token: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As the server gave them."""
        _check_temperature(self.temperature, "the likeliest ids")
        at, device = token.cpu(), self.hidden_s.device
        return self.said.top_ids[at, :k].to(device), self.said.top_logps[at, :k].to(device)


def _check_temperature(temperature: float, what: str) -> None:
    if temperature != 1.0:
        raise ConfigError(
            f"kd_temperature={temperature} needs whole rows of the teacher, and a served teacher gives {what} at "
            "temperature 1 only. Leave kd_temperature at 1."
        )


def prepare_served(teacher: Teacher, terms: Sequence[Term], kd_temperature: float, rewards: bool) -> None:
    """Tell a served teacher what the terms will read.

    Raises:
        ConfigError: a temperature that its numbers do not have; `rewards` says that log-probs are read at it.
        TeacherError: it does not give as many likeliest ids as a term reads.
    """
    if teacher.level >= Level.HIDDEN:
        return
    if rewards or any(not isinstance(t.objective, PathObjective) for t in terms):
        _check_temperature(kd_temperature, "log-probs")
    for term in terms:
        if isinstance(term.objective, TopK):
            teacher.want(term.objective.k)


def auto_objective(teacher: Teacher, same_vocabulary: bool) -> str:
    """The objective that `auto` stands for."""
    if teacher.level < Level.HIDDEN:
        return "top_k" if teacher.level >= Level.TOP_K else "alm"
    return "jsd" if same_vocabulary else "strict"
