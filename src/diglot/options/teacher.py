"""The options of one teacher: those of the configuration, or an entry of a list of teachers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from diglot.errors import ConfigError
from diglot.http.address import checked_address, is_address
from diglot.options.config import DistillationConfig
from diglot.ranges import as_mapping, check_ranges

# Key of an entry -> the option that it stands in for.
ENTRY_OPTIONS = {
    "tokenizer": "teacher_tokenizer_name_or_path",
    "tokenizer_kwargs": "teacher_tokenizer_kwargs",
    "revision": "teacher_model_revision",
    "init_kwargs": "teacher_model_init_kwargs",
    "chat_template_kwargs": "teacher_chat_template_kwargs",
    "max_length": "teacher_max_length",
    "system_prompt": "teacher_system_prompt",
}
_MAPPINGS = ("tokenizer_kwargs", "init_kwargs", "chat_template_kwargs")
_TEXTS = ("label", "tokenizer", "revision", "system_prompt")


@dataclass(frozen=True)
class TeacherOptions:
    """One teacher and how it reads. Checked as the options of the same meaning are."""

    name: Any = None  # a model, or its id, folder, address or folder of scores
    weight: float = 1.0  # 0 or more, relative to the other teachers'
    label: str = "teacher"  # in the log, and in the column `teacher` of the data
    tokenizer: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None
    revision: str | None = None
    init_kwargs: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_length: int | None = None  # tokens of the teacher
    system_prompt: str | None = None
    server_url: str | None = None
    several: bool = False  # is it one of a list?

    def __post_init__(self) -> None:
        try:
            self._check()
        except ConfigError as error:
            if not self.several:
                raise
            raise ConfigError(f"In teacher_model_name_or_path, teacher {self.label!r}: {error}") from None

    def _check(self) -> None:
        for name in _TEXTS:
            if not isinstance(getattr(self, name), (str, type(None))):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not allowed: it must be text.")
        for name in _MAPPINGS:
            as_mapping(ENTRY_OPTIONS[name], getattr(self, name))
        check_ranges({"teacher_max_length": self.max_length})
        weight = self.weight
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
            raise ConfigError(f"A teacher's weight is {weight!r}: it must be a number, 0 or more.")
        if is_address(self.name):
            checked_address(self.name, "teacher_model_name_or_path")

    @classmethod
    def of(cls, name: Any, args: DistillationConfig) -> TeacherOptions:
        """The single teacher of a configuration; `name` is the model or name that a trainer was given, or None."""
        options: dict[str, Any] = {key: getattr(args, option) for key, option in ENTRY_OPTIONS.items()}
        return cls(
            args.teacher_model_name_or_path if name is None else name,
            **options,
            server_url=args.teacher_model_server_url,
        )

    @classmethod
    def of_list(cls, entries: list[Any] | tuple[Any, ...], args: DistillationConfig) -> list[TeacherOptions]:
        """Several teachers: models, names, or mappings with `name` and keys of their own.

        Raises:
            ConfigError: an unknown key or a value that cannot work, no positive weight, or equal labels.
        """
        common = replace(cls.of(None, args), name=None)
        teachers = [cls._of_entry(entry, common, i) for i, entry in enumerate(entries)]
        labels, weights = [one.label for one in teachers], [one.weight for one in teachers]
        if len(set(labels)) < len(labels):
            raise ConfigError(f"The teachers are called {labels}: give each its own `label`.")
        if sum(weights) <= 0:
            raise ConfigError(f"The teachers' weights are {weights}: at least one must be greater than 0.")
        return teachers

    @classmethod
    def _of_entry(cls, entry: Any, common: TeacherOptions, i: int) -> TeacherOptions:
        own: dict[str, Any] = dict(entry) if isinstance(entry, Mapping) else {"name": entry}
        keys = ["name", "weight", "label", *ENTRY_OPTIONS]
        if wrong := sorted(own.keys() - set(keys)):
            raise ConfigError(
                f"{wrong[0]!r} is no key of a teacher in teacher_model_name_or_path; keys are {', '.join(keys)}."
            )
        if own.get("name") is None:
            raise ConfigError(f"Teacher {i + 1} has no `name`. Write {{name: MODEL, weight: 1.0}}.")
        label = own.pop("label", None) or (own["name"] if isinstance(own["name"], str) else f"teacher{i + 1}")
        for name in _MAPPINGS:
            if isinstance(own.get(name), str):
                own[name] = as_mapping(ENTRY_OPTIONS[name], own[name])
        return replace(common, **{**own, "label": label, "several": True})

    @property
    def name_or_path(self) -> str | None:
        """The name, of a teacher that was given by name."""
        return self.name if isinstance(self.name, str) else None
