"""What all teachers have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from diglot.batches import PackedSide
from diglot.errors import TeacherError
from diglot.objectives.levels import Level
from diglot.rendering import Renderer
from diglot.teachers.local import LocalTeacher

if TYPE_CHECKING:  # it needs packages that not everyone has
    from diglot.teachers.scored import KeptScores
    from diglot.teachers.served import Pending


class Teacher(Protocol):
    """A frozen model that scores packed batches, here or elsewhere.

    One that offers `Level.HIDDEN` is a `LocalTeacher`, whose hidden states are read; of one that offers less, what
    `ask` brings is all there is.
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

    def to(self, device: torch.device | str) -> None:
        """Move what lies in memory here."""

    def want(self, top: int) -> None:
        """From now on the likeliest `top` ids of each row are read. `TeacherError` if it gives fewer."""

    def ask(self, side: PackedSide, stop_as_set: bool = True) -> Pending | KeptScores | None:
        """Begin to score a batch, if that goes on by itself; None for a teacher that is run when it is needed."""

    def break_off(self) -> None:
        """Give up what is under way."""


def local(teacher: Teacher, what: str) -> LocalTeacher:
    """The teacher as a model of this process. `TeacherError` that names `what` needs it, if it is none."""
    if not isinstance(teacher, LocalTeacher):
        raise TeacherError(
            f"{what} needs the teacher's model in this process, and the teacher is {teacher.name}, which gives "
            f"{teacher.level.name}. Switch it off, or load the teacher here."
        )
    return teacher
