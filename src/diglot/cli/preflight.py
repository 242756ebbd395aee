"""What can be known before a model is loaded: names of objectives and models. Each is a `ConfigError` that says what to
do. What needs no torch either is looked at earlier (`early.py`)."""

from __future__ import annotations

from importlib import import_module

from diglot.cli.names import check_model_name
from diglot.cli.script import TrainArguments
from diglot.comparisons import entries_of
from diglot.comparisons.connect import address_of, tokenizer_place
from diglot.objectives.registry import check_objective
from diglot.options import DistillationConfig, TeacherOptions
from diglot.teachers.adapter import OWN_BASE


def preflight(script: TrainArguments, config: DistillationConfig) -> None:
    """Look at all that needs no model; `ConfigError` for the first that is wrong."""
    for entry in entries_of(config.objective):
        if entry.name != "auto":
            check_objective(entry.name, entry.options)
    student = str(script.model_name_or_path)
    check_model_name(student, "student", "model_name_or_path", script.model_revision)
    if script.tokenizer_name_or_path is not None:
        check_model_name(
            script.tokenizer_name_or_path, "student's tokenizer", "tokenizer_name_or_path", script.model_revision
        )
    _check_teachers(config)


def _check_teachers(config: DistillationConfig) -> None:
    option, named = "teacher_model_name_or_path", config.teacher_model_name_or_path
    for one in TeacherOptions.of_list(named, config) if isinstance(named, list) else [TeacherOptions.of(None, config)]:
        if one.tokenizer is not None:
            place = f"tokenizer in {option}" if one.several else "teacher_tokenizer_name_or_path"
            check_model_name(one.tokenizer, "teacher's tokenizer", place, one.revision)
        if (address := address_of(one)) is not None:
            tokenizer_place(one, address)
            import_module("diglot.http.client")  # which says what to install
        elif one.name != OWN_BASE:
            check_model_name(str(one.name), "teacher", option, one.revision)
