"""The rows of a run's datasets, each read once on both sides before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from datasets import IterableDataset

from diglot.batches import PairReader
from diglot.comparisons.comparison import Comparison
from diglot.data import Sample, usable_rows
from diglot.data.samples import LEAVE_OUT
from diglot.data.survey import Read, names_teachers
from diglot.errors import DataError, RenderingError
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
        if data is None:
            return None
        readers = [one.reader for one in comparisons]
        routed = names_teachers(data) if name == "train" and len(readers) > 1 else None
        read = RowReader(readers, replies, args.max_completion_length, routed)
        return _usable(comparisons, args, data, name, read, replies, routed)

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
    routed: bool | None = None,
) -> Any:
    readers = [one.reader for one in comparisons]
    with args.main_process_first(local=False):  # the others read what it wrote
        return usable_rows(
            data,
            read,
            name=name,
            about={
                "sides": [_about(r) for r in readers],
                "replies": replies,
                "space": args.max_completion_length,
                "routed": routed,
            },
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


@dataclass(frozen=True)
class RowReader:
    """How a row is read: with its reply where training reads that, else its prompt alone."""

    readers: list[PairReader]
    replies: str | None  # why a row must have a reply; None if it need not
    space: int  # tokens that a prompt must leave for what the student writes
    routed: bool | None = None  # must a row name its teacher? None: as it likes

    def __call__(self, sample: Sample) -> bool:
        """Does it fit? Raises `DiglotError` if it cannot be read."""
        if self.replies and sample.reply is None:
            raise DataError(f"{sample.where} has no completion, and {self.replies}.")
        route = sample.conversation.route
        if len(self.readers) > 1 and (self.routed or route is not None):
            check_route(route, [str(one.label) for one in self.readers], sample.where)
            if self.routed is False:
                raise DataError(
                    f"{sample.where} names the teacher {route!r}, and the rows before it name none. Name one of them "
                    "in every row, or in none."
                )
        fits = False  # on both sides of one comparison at least: what the others could not read is watched in training
        for reader in self.readers:
            if self.replies:
                fits |= reader.written(sample) is not None
            else:
                conversation = sample.conversation
                fits |= reader.prompt_ids(conversation, self.space) is not None
                inside = reader.student.opens_thinking(conversation)
                reader.teacher.prompt_ids(reader.teacher_reads(conversation), thinking=inside)
            reader.take_dropped()
        return fits


@contextmanager
def rows_named(comparisons: Sequence[Comparison], window: Sequence[Sequence[Sample]]) -> Iterator[None]:
    """An error about a row that nobody has read before, as of a stream, names it and the way to leave it out."""
    try:
        yield
    except (DataError, RenderingError) as error:
        read = RowReader([one.reader for one in comparisons], None, 0)
        for sample in (one for batch in window for one in batch):
            try:
                read(sample)
            except (DataError, RenderingError) as own:
                message = str(own) if sample.where in str(own) else f"{sample.where}: {own}"
                raise DataError(f"{message} {LEAVE_OUT}") from error
        raise


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
