"""What does the teacher say about these bytes?"""

from diglot.objectives.rungs import Rung
from diglot.teachers.inputs import TeacherInputs, build_teacher_inputs_from_texts
from diglot.teachers.local import LocalTeacher, find_teacher_tokenizer

__all__ = ["LocalTeacher", "Rung", "TeacherInputs", "build_teacher_inputs_from_texts", "find_teacher_tokenizer"]
