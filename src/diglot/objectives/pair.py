"""What two vocabularies and stop sets are to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diglot.errors import ConfigError

if TYPE_CHECKING:
    from diglot.rendering import Renderer
    from diglot.vocabulary import Speller, Vocabulary


@dataclass(frozen=True)
class Tables:
    """What the tokens of both sides are."""

    student: Vocabulary
    teacher: Vocabulary
    spell_s: Speller | None = None
    spell_t: Speller | None = None


@dataclass(frozen=True)
class Pair:
    """What two vocabularies and stop sets are to each other."""

    same: bool  # one table of ids: id i has the same bytes on both sides
    size_s: int  # width of the student's logits
    size_t: int  # width of the teacher's logits
    shared_s: Tensor  # int64 [K] student ids of the byte-equal, unambiguous, non-control tokens
    shared_t: Tensor  # int64 [K] their teacher ids
    stop_s: Tensor  # int64 ids that end a turn, student
    stop_t: Tensor  # int64 ids that end a turn, teacher
    tables: Tables | None = None  # the vocabularies themselves, for objectives that look into tokens

    @classmethod
    def of(
        cls,
        student: Vocabulary,
        teacher: Vocabulary,
        stop_s: Sequence[int],
        stop_t: Sequence[int],
        spell_s: Speller | None = None,
        spell_t: Speller | None = None,
    ) -> Pair:
        """The pair of two vocabularies, whose lengths are the widths of the logits, and two stop sets.

        `spell_s` and `spell_t` are each side's `ByteEncoder.spell`; few objectives ask for them.
        """
        shared_s, shared_t = student.shared(teacher)
        return cls(
            same=student.same_as(teacher),
            size_s=len(student),
            size_t=len(teacher),
            shared_s=torch.as_tensor(shared_s, dtype=torch.int64),
            shared_t=torch.as_tensor(shared_t, dtype=torch.int64),
            stop_s=torch.tensor(list(stop_s), dtype=torch.int64),
            stop_t=torch.tensor(list(stop_t), dtype=torch.int64),
            tables=Tables(student, teacher, spell_s, spell_t),
        )

    @classmethod
    def of_renderers(cls, student: Renderer, teacher: Renderer) -> Pair:
        """The same of two sides as they read."""
        spellers = student.encoder.spell, teacher.encoder.spell
        return cls.of(student.vocabulary, teacher.vocabulary, student.stop_ids, teacher.stop_ids, *spellers)

    def need_tables(self, name: str) -> Tables:
        """The vocabularies. `ConfigError` if the pair was made without them."""
        if self.tables is None:
            raise ConfigError(f"objective {name!r} looks into tokens, and this pair has no vocabularies: use Pair.of.")
        return self.tables

    def to(self, device: torch.device | str) -> Pair:
        """The same with its tensors on `device`."""
        return replace(self, **_moved(self, device))


def _moved(record: Any, device: torch.device | str) -> dict[str, Any]:
    return {f.name: v.to(device) for f in fields(record) if isinstance(v := getattr(record, f.name), Tensor)}
