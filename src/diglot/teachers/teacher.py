"""What all teachers have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import torch
from torch import Tensor

from diglot.batches import PackedSide
from diglot.errors import TeacherError
from diglot.heads import Branches, Head
from diglot.objectives.levels import Level
from diglot.rendering import Renderer
from diglot.teachers.local import LocalTeacher

if TYPE_CHECKING:  # it needs packages that not everyone has
    from diglot.teachers.scored import StoredScores
    from diglot.teachers.served import Pending


class Teacher(Protocol):
    """A frozen model that scores packed batches, here or elsewhere.

    One that offers `Level.HIDDEN` is `WholeRows` as well; of one that offers less, what `ask` brings is all there is.
    """

    renderer: Renderer

    @property
    def max_length(self) -> int | None:
        """Longest input in tokens, if there is a limit."""

    @property
    def level(self) -> Level:
        """The most that it gives."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def model_name(self) -> str:
        """The model's name alone, without where it runs: what others may read."""

    def to(self, device: torch.device | str) -> None:
        """Move what lies in memory here."""

    def want(self, top: int) -> None:
        """From now on the likeliest `top` ids of each row are read. `TeacherError` if it gives fewer."""

    def ask(self, side: PackedSide, stop_as_set: bool = True) -> Pending[Any] | StoredScores | None:
        """Begin to score a batch, if that goes on by itself; None for a teacher that is run when it is needed."""

    def break_off(self) -> None:
        """Give up what is under way."""


class WholeRows(Teacher, Protocol):
    """A teacher whose hidden states are read here, with its head: a model of this process, or one that is served."""

    head: Head

    def hidden(self, side: PackedSide) -> Tensor:
        """The hidden state that predicts each scored token, `[N_t, H_t]`, on the device of the head."""

    def behind(self, side: PackedSide, branches: Branches) -> Tensor:
        """The hidden states behind every token of branches off the texts, `[E, H_t]`."""


class ChosenIds(Teacher, Protocol):
    """A teacher of `Level.CHOSEN`."""

    def chosen(self, side: PackedSide, token: Tensor, ids: Tensor) -> Tensor:
        """Log-probs of `ids` in the rows that predict the scored tokens `token`, `[Q]` nats each, on the CPU."""


def scores_chosen(teacher: Teacher) -> TypeGuard[ChosenIds]:
    """Is it asked for ids, as it gives no whole rows?"""
    return teacher.level == Level.CHOSEN


def gives_rows(teacher: Teacher) -> TypeGuard[WholeRows]:
    """Does it give whole rows?"""
    return teacher.level >= Level.HIDDEN


def whole_rows(teacher: Teacher, what: str) -> WholeRows:
    """The teacher as one that gives hidden states. `TeacherError` that names `what` needs them, if it gives none."""
    if not gives_rows(teacher):
        raise TeacherError(f"{what} needs hidden states, and the teacher is {teacher.name}, which gives less.")
    return teacher


def local(teacher: Teacher, what: str) -> LocalTeacher:
    """The teacher as a model of this process. `TeacherError` that names `what` needs it, if it is none."""
    if not isinstance(teacher, LocalTeacher):
        raise TeacherError(
            f"{what} needs the teacher's model in this process, and the teacher is {teacher.name}, which is "
            "elsewhere. Switch it off, or load the teacher here."
        )
    return teacher
