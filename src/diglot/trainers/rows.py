"""The rows of a trainer's datasets, each read once on both sides before anything is trained."""

from __future__ import annotations

from typing import Any

from diglot.batches import PairReader
from diglot.data import Sample, usable_rows
from diglot.data.survey import Read
from diglot.errors import DataError
from diglot.rendering import Renderer


def checked_rows(trainer: Any, train: Any, evaluation: Any) -> tuple[Any, Any]:
    """Both datasets with the rows that can be used; see `usable_rows`."""
    replies = trainer.needs_replies
    rows = None if train is None else _checked(trainer, train, "train", replies)
    texts = getattr(trainer, "lm_dataset", None)
    if texts is not None:
        trainer.lm_dataset = _usable(trainer, texts, "lm_dataset", _reads_texts(trainer.lanes[0].reader), "a reference")
    if isinstance(evaluation, dict):
        return rows, {name: _checked(trainer, one, f"eval ({name})", None) for name, one in evaluation.items()}
    return rows, None if evaluation is None else _checked(trainer, evaluation, "eval", None)


def _checked(trainer: Any, data: Any, name: str, replies: str | None) -> Any:
    readers = [lane.reader for lane in trainer.lanes]
    return _usable(trainer, data, name, reads(readers, replies, trainer.args.max_completion_length), replies)


def _usable(trainer: Any, data: Any, name: str, read: Read, replies: str | None) -> Any:
    args, lanes = trainer.args, trainer.lanes
    readers = [lane.reader for lane in lanes]
    with args.main_process_first(local=False):  # the others read what it wrote
        return usable_rows(
            data,
            read,
            name=name,
            about={"sides": [_about(r) for r in readers], "replies": replies, "space": args.max_completion_length},
            on_bad_row=args.on_bad_row,
            templates=all(side.has_template for r in readers for side in (r.student, r.teacher)),
            labels=[lane.label for lane in lanes] if len(lanes) > 1 else [],
        )


def reads(readers: list[PairReader], replies: str | None, space: int) -> Read:
    """How a row is read: with its reply where training reads that, else its prompt alone.

    Args:
        replies: why a row must have a reply; None if it need not.
        space: tokens that a prompt must leave for what the student writes.
    """

    def read(sample: Sample) -> bool:
        if replies and sample.reply is None:
            raise DataError(f"{sample.where} has no completion, and {replies}.")
        for reader in readers:
            if replies:
                reader.written(sample)
            else:
                conversation = sample.conversation
                reader.prompt_ids(conversation, space)
                inside = reader.student.opens_thinking(conversation)
                reader.teacher.prompt_ids(reader.teacher_reads(conversation), thinking=inside)
        return not sum(sum(reader.take_dropped().values()) for reader in readers)

    return read


def _reads_texts(reader: PairReader) -> Read:
    """How a text to imitate is read: by the student alone."""

    def read(sample: Sample) -> bool:
        reader.reference(sample)
        return not sum(reader.take_dropped().values())

    return read


def _about(reader: PairReader) -> list[Any]:
    limits = [reader.max_length, reader.teacher_max_length, reader.score_turns, reader.teacher_system, reader.label]
    return [*limits, *(_described(side) for side in (reader.student, reader.teacher))]


def _described(side: Renderer) -> list[Any]:
    return [side.vocabulary.content_hash, getattr(side.tokenizer, "chat_template", None), side.template.kwargs]
