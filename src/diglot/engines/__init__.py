"""How do engines that train elsewhere read a teacher with another tokenizer?"""

from __future__ import annotations

from diglot.engines.credit import RULES
from diglot.engines.likeliest import Likeliest
from diglot.engines.project import Projected, Projector, project_teacher_scores
from diglot.engines.reading import Reading
from diglot.engines.scores import TeacherScores, score_hidden
from diglot.engines.transcript import Transcript

__all__ = [
    "RULES",
    "Likeliest",
    "Projected",
    "Projector",
    "Reading",
    "TeacherScores",
    "Transcript",
    "project_teacher_scores",
    "score_hidden",
]
