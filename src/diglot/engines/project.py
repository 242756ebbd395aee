"""A teacher's scores of its own reading, as scores of the tokens that a student sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from diglot.arrays import Bools, Floats, Ints
from diglot.engines.covering import Covering
from diglot.engines.credit import find_rule
from diglot.engines.likeliest import Likeliest
from diglot.engines.reading import Reading, read
from diglot.engines.scores import ROUNDING, TeacherScores, as_array
from diglot.engines.transcript import Transcript
from diglot.errors import ConfigError, DataError
from diglot.rendering import Renderer

Side = Renderer | PreTrainedTokenizerBase
Ask = Callable[[Ints], TeacherScores]


@dataclass(frozen=True)
class Projected:
    """One entry for each of the student's ids that were given, `[n]`. What is not valid is NaN, never a number."""

    logps: Floats  # [n] nats: the teacher's, by the credit rule; the sum over a chunk is the teacher's
    valid: Bools  # [n] was it sampled, and does the teacher say something about it?
    chunk: Ints  # [n] the chunk of each valid token, ascending; -1 for the others
    sampled: Bools  # [n] did the student write it? Stops with it, not what stands behind a turn's first stop
    one_to_one: Bools  # [n] is its chunk one token on either side? Then its log-prob is no share
    likeliest: Likeliest | None = None  # of the rows of `at`
    at: Ints | None = None  # [R] the ids before which it is, ascending

    @property
    def coverage(self) -> float:
        """Share in [0, 1] of the sampled tokens that are valid; 1 if none was sampled."""
        return float(self.valid.sum() / self.sampled.sum()) if self.sampled.any() else 1.0

    def filled(self, otherwise: Any) -> Floats:
        """Log-probs with `otherwise` (a number, or `[n]` such as the student's own log-probs) where not valid.

        With the student's own a token that the teacher says nothing about has no difference, so no reward.
        """
        values = as_array(otherwise, np.float64)
        if values.shape not in ((), self.logps.shape):
            raise DataError(
                f"There are {len(self.logps)} ids and values of shape {values.shape}: one each, or a number."
            )
        return np.where(self.valid, self.logps, values)


class Projector:
    """A pair of models that read the same text each in its own way. Immutable: threads may share it, and it pickles.

    Args:
        student: its renderer, or its tokenizer.
        teacher: likewise.
        teacher_max_length: longest input of the teacher in its tokens; what is beyond is cut and not valid.

    Raises:
        ConfigError: a `teacher_max_length` that is no number of tokens.
    """

    def __init__(self, student: Side, teacher: Side, *, teacher_max_length: int | None = None) -> None:
        self.student, self.teacher = _renderer(student, "student"), _renderer(teacher, "teacher")
        most = teacher_max_length
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
            raise ConfigError(f"teacher_max_length is {most!r}, expected a whole number of tokens from 1, or None.")
        self.teacher_max_length = most

    def __getstate__(self) -> dict[str, Any]:
        """Without what was found out about the tokenizers so far: it holds functions, and is found out again."""
        return {name: value for name, value in vars(self).items() if name != "_covering"}

    def read(self, transcript: Transcript) -> Reading:
        """What the teacher is to score: `teacher_ids` of the result. Errors: see `diglot.engines.reading.read`."""
        return read(transcript, self.student, self.teacher, self.teacher_max_length)

    def project(
        self, reading: Reading, scores: TeacherScores | Any, *, credit: str = "shared", student_logps: Any = None
    ) -> Projected:
        """Scores of `reading.teacher_ids` as scores of `reading.student_ids`.

        Args:
            scores: `TeacherScores`, or log-probs `[T]` alone.
            credit: a name of `diglot.engines.credit.RULES`.
            student_logps: `[n]` nats, the student's own, for credit "gap".

        Raises:
            TeacherError: scores of another number of tokens, NaN, or likeliest ids that are no part of a distribution.
            DataError: student log-probs of another number of tokens, or none at a token that is scored.
            ConfigError: no such rule, or "gap" without the student's log-probs.
        """
        rule = find_rule(credit)
        aligned = reading.alignment
        if not isinstance(scores, TeacherScores):
            scores = TeacherScores.of(scores)
        scores = scores.checked(reading.teacher_ids)
        teacher = self._teacher_logps(reading, scores)
        inside = aligned.in_exact_chunk(aligned.chunk_s)
        if credit == "pairs":
            inside = np.zeros_like(inside)
            inside[aligned.pair_s] = True
        chunk = aligned.chunk_s[inside]
        own = None if student_logps is None else _student_logps(student_logps, reading, reading.place_s[inside])
        with_chunk = aligned.chunk_t >= 0
        sums = np.bincount(aligned.chunk_t[with_chunk], teacher[with_chunk], minlength=aligned.num_chunks).astype(float)
        values = rule(sums, chunk, aligned.count_s, own)
        likeliest, at = self._likeliest(reading, scores, teacher)
        return replace(_spread(reading, inside, values), likeliest=likeliest, at=at)

    def _teacher_logps(self, reading: Reading, scores: TeacherScores) -> Floats:
        """Log-probs of the teacher's scored tokens; stop as one event, as far as its ids are among the likeliest."""
        logps = scores.logps[reading.place_t]
        if scores.top_ids is None or scores.top_logps is None:
            return np.minimum(logps, 0.0)
        for i in np.flatnonzero(reading.stop_t):
            at = reading.place_t[i]
            ids = scores.top_ids[at]
            others = np.isin(ids, self.teacher.stop_ids) & (ids != reading.teacher_ids[at])
            logps[i] = np.logaddexp.reduce([logps[i], *scores.top_logps[at][others]])
        return np.minimum(logps, 0.0)

    def _likeliest(
        self, reading: Reading, scores: TeacherScores, logps: Floats
    ) -> tuple[Likeliest | None, Ints | None]:
        if scores.top_ids is None or scores.top_logps is None:
            return None, None
        ids, top = scores.top_ids[reading.place_t], scores.top_logps[reading.place_t]
        likeliest, student = self._covering.distribution(reading.written, logps, ids, top)
        return likeliest, reading.place_s[student]

    @cached_property
    def _covering(self) -> Covering:
        return Covering(self.student, self.teacher)


def project_teacher_scores(
    student: Side,
    teacher: Side,
    conversation: Sequence[Mapping[str, Any]] | Transcript,
    ids: Any = None,
    scores: TeacherScores | Ask | Any = None,
    *,
    sampled: Any = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    credit: str = "shared",
    student_logps: Any = None,
) -> Projected:
    """What a teacher with any tokenizer says about each token that a student sampled.

    The teacher reads the conversation in its own template and tokens. Both sides' tokens are aligned on bytes; a chunk
    is the shortest run of bytes at whose ends both have a token boundary. The log-prob of a chunk is the teacher's,
    exactly; `credit` says how the chunk's tokens share it. A turn's end is one event, whatever either side writes for
    it. Only what the student sampled is scored.

    Needs no trainer, no process group and no device. A `Projector` does the same in two steps, `read` and `project`,
    for engines that ask the teacher elsewhere in between. Renderers take a moment to make: make them once.

    Args:
        student: its `Renderer` (reused, which is fast) or its tokenizer.
        teacher: likewise.
        conversation: messages before the completion; with `sampled` the whole conversation; or a `Transcript`.
        ids: `[n]` the completion as it was sampled; with `sampled` the whole context.
        scores: what the teacher says about its own reading, or a function of its ids `[T]` that returns it: a
            `TeacherScores`, or log-probs `[T]` alone. Entry t is about token t; the first is not read.
        sampled: `[n]` mask of what the student wrote, for several turns.
        tools: as the chat templates take them.
        credit: "shared", "gap", "first", "last" or "pairs", see `diglot.engines.credit`.
        student_logps: `[n]` nats, for credit "gap".

    Returns:
        Log-probs in nats and a valid mask, one entry for each of `ids`; with likeliest ids, also the distribution at
        the ids that open a chunk.

    Raises:
        DataError: ids, mask and messages that do not belong together.
        RenderingError: the teacher's template refuses the conversation.
        TeacherError: scores that are not of the teacher's reading.
    """
    if isinstance(conversation, Transcript):
        if extra := [name for name, one in (("ids", ids), ("sampled", sampled), ("tools", tools)) if one is not None]:
            raise DataError(f"{' and '.join(extra)} given beside a Transcript, which has its own: leave it out.")
        transcript = conversation
    elif sampled is not None:
        transcript = Transcript.of_mask(conversation, ids, sampled, tools)
    else:
        transcript = Transcript.of_completion(conversation, ids, tools)
    projector = Projector(student, teacher)
    reading = projector.read(transcript)
    result = scores(reading.teacher_ids) if callable(scores) else scores
    return projector.project(reading, result, credit=credit, student_logps=student_logps)


def _renderer(side: Side, name: str) -> Renderer:
    return side if isinstance(side, Renderer) else Renderer(side, name=name)


def _student_logps(values: Any, reading: Reading, places: Ints) -> Floats:
    """The student's own at the places that are scored. `DataError` unless they are one number each, of at most 0."""
    own = as_array(values, np.float64)
    if own.shape != reading.student_ids.shape:
        raise DataError(
            f"There are {len(reading.student_ids)} ids and student log-probs of shape {own.shape}: one each."
        )
    read = own[places]
    wrong = np.flatnonzero(~(np.isfinite(read) & (read <= ROUNDING)))
    if len(wrong):
        at = int(places[wrong[0]])
        raise DataError(
            f"The student's log-prob of token {at} (id {reading.student_ids[at]}) is {own[at]}, expected a finite "
            "number of at most 0: it was sampled, so its sampler has one."
        )
    return read


def _spread(reading: Reading, inside: Bools, values: Floats) -> Projected:
    """Values of the packed tokens `inside` at their places among all ids."""
    count = len(reading.student_ids)
    logps, chunk = np.full(count, np.nan), np.full(count, -1, dtype=np.int64)
    valid = np.zeros(count, dtype=bool)
    place = reading.place_s[inside]
    logps[place], valid[place], chunk[place] = values, True, reading.alignment.chunk_s[inside]
    single = np.zeros(count, dtype=bool)
    single[reading.place_s[reading.alignment.pair_s]] = True
    return Projected(logps, valid, chunk, reading.sampled, single)
