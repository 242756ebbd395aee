"""What does the teacher say about these bytes?"""

from diglot.teachers.cache import CachedTeacher
from diglot.teachers.inputs import TeacherInputs, build_teacher_inputs_from_texts
from diglot.teachers.local import LocalTeacher, find_teacher_tokenizer
from diglot.teachers.teacher import Teacher, WholeRows, gives_rows, local, scores_chosen, whole_rows

__all__ = [
    "CachedTeacher",
    "LocalTeacher",
    "Teacher",
    "TeacherInputs",
    "WholeRows",
    "build_teacher_inputs_from_texts",
    "find_teacher_tokenizer",
    "gives_rows",
    "local",
    "scores_chosen",
    "whole_rows",
]
