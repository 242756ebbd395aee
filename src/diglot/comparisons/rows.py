"""The rows of a run's datasets, each read once on both sides before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import IterableDataset

from diglot.batches import PairReader
from diglot.comparisons.comparison import Comparison
from diglot.data import Sample, usable_rows
from diglot.data.survey import Read
from diglot.errors import DataError
from diglot.options import DistillationConfig
from diglot.rendering import Renderer
from diglot.teachers.fingerprint import template_digest


def checked_rows(
    comparisons: Sequence[Comparison],
    args: DistillationConfig,
    train: Any,
    evaluation: Any,
    replies: str | None = None,
) -> tuple[Any, Any]:
    """Both datasets with the rows that can be used; see `usable_rows`.

    Args:
        evaluation: one dataset, or several by name.
        replies: why every row of `train` must have a completion, for a message; None if it need not.
    """

    def checked(data: Any, name: str, replies: str | None = None) -> Any:
        read = reads([one.reader for one in comparisons], replies, args.max_completion_length)
        return None if data is None else _usable(comparisons, args, data, name, read, replies)

    rows = checked(train, "train", replies)
    if any(
        isinstance(one, IterableDataset)
        for one in (evaluation.values() if isinstance(evaluation, dict) else [evaluation])
    ):
        raise DataError(
            "eval_dataset is a stream, and every evaluation reads the same rows on all ranks. Give rows that can be "
            "counted: Dataset.from_list(list(stream.take(200)))."
        )
    if isinstance(evaluation, dict):
        return rows, {name: checked(one, f"eval ({name})") for name, one in evaluation.items()}
    return rows, checked(evaluation, "eval")


def checked_texts(comparison: Comparison, args: DistillationConfig, texts: Any) -> Any:
    """`lm_dataset` with the rows that the student can imitate; None stays None."""
    read = _reads_texts(comparison.reader)
    return None if texts is None else _usable([comparison], args, texts, "lm_dataset", read, "a reference")


def _usable(
    comparisons: Sequence[Comparison],
    args: DistillationConfig,
    data: Any,
    name: str,
    read: Read,
    replies: str | None,
) -> Any:
    readers = [one.reader for one in comparisons]
    with args.main_process_first(local=False):  # the others read what it wrote
        return usable_rows(
            data,
            read,
            name=name,
            about={"sides": [_about(r) for r in readers], "replies": replies, "space": args.max_completion_length},
            on_bad_row=args.on_bad_row,
            templates=all(side.has_template for r in readers for side in (r.student, r.teacher)),
            replies=replies is not None,
            labels=[one.label for one in comparisons] if len(comparisons) > 1 else [],
        )


def check_route(route: str | None, labels: Sequence[str], where: str) -> None:
    """Raise `DataError` if a row, of several that name teachers, names none of them."""
    if route not in labels:
        shown = "names no `teacher`, as other rows do" if route is None else f"names the teacher {route!r}"
        raise DataError(f"{where} {shown}; there are {', '.join(labels)}. Name one of them in every row.")


def reads(readers: list[PairReader], replies: str | None, space: int) -> Read:
    """How a row is read: with its reply where training reads that, else its prompt alone.

    Args:
        replies: why a row must have a reply; None if it need not.
        space: tokens that a prompt must leave for what the student writes.
    """

    labels = [str(one.label) for one in readers]

    def read(sample: Sample) -> bool:
        if replies and sample.reply is None:
            raise DataError(f"{sample.where} has no completion, and {replies}.")
        if len(readers) > 1 and sample.conversation.route is not None:
            check_route(sample.conversation.route, labels, sample.where)
        fits = False  # on both sides of one comparison at least: what the others could not read is watched in training
        for reader in readers:
            if replies:
                fits |= reader.written(sample) is not None
            else:
                conversation = sample.conversation
                fits |= reader.prompt_ids(conversation, space) is not None
                inside = reader.student.opens_thinking(conversation)
                reader.teacher.prompt_ids(reader.teacher_reads(conversation), thinking=inside)
            reader.take_dropped()
        return fits

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
    return [side.vocabulary.content_hash, template_digest(side, side.template.kwargs)]
