"""One transcript as both models read it: the student's ids as they stand, the teacher's own rendering, aligned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diglot.alignment import Alignment, Side, align, check_bytes
from diglot.arrays import Bools, Ints
from diglot.batches import Written, WrittenSide
from diglot.engines.transcript import Transcript
from diglot.errors import RenderingError, VocabularyError
from diglot.rendering import Conversation, Rendered, Renderer, Role, truncate

_NOTHING = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Reading:
    """Which token of which side is where. Scored tokens are packed: `[N_s]` of the student, `[N_t]` of the teacher."""

    student_ids: Ints  # [n] of the transcript
    teacher_ids: Ints  # [T] what the teacher is to score
    place_s: Ints  # [N_s] where in `student_ids`
    place_t: Ints  # [N_t] where in `teacher_ids`
    written: Written  # the scored tokens of both sides, the bytes of each turn as far as both hold them
    num_bytes: int  # of the turns that are scored
    sampled: Bools  # [n] of `student_ids`: was it sampled? What stands behind a turn's first stop was not

    @property
    def alignment(self) -> Alignment[NDArray[Any]]:
        """Of the scored tokens."""
        return self.written.alignment

    @property
    def stop_t(self) -> Bools:
        """Which of the teacher's scored tokens are the stop event, `[N_t]`."""
        return self.written.teacher.stop

    @property
    def first_scored(self) -> int:
        """The first place of `teacher_ids` whose log-prob is read; `len(teacher_ids)` if none is."""
        return int(self.place_t[0]) if len(self.place_t) else len(self.teacher_ids)


def read(
    transcript: Transcript, student: Renderer, teacher: Renderer, teacher_max_length: int | None = None
) -> Reading:
    """Both sides of a transcript.

    Raises:
        DataError: the teacher's prompt alone fills `teacher_max_length`.
        RenderingError: the teacher's template refuses the conversation, or drops a sampled turn.
        VocabularyError: an id that is not the student's.
    """
    sampled = _sampled(transcript, student)
    rendered = [_turn(student, transcript.ids[low:high][sampled[low:high]]) for low, high in transcript.turns]
    texts = [r.segment_bytes[0] for r in rendered]
    last = len(rendered) - 1
    segment_of = [k for k, text in enumerate(texts) if text or k == last]  # a turn without text is no segment
    theirs = _teacher_side(transcript, rendered, student, teacher, len(segment_of))
    if student.vocabulary.same_as(teacher.vocabulary):
        theirs = _with_own_tokens(theirs, [rendered[k] for k in segment_of])
    if teacher_max_length is not None:
        theirs = truncate(theirs, teacher_max_length)
    for k, text in zip(segment_of, theirs.segment_bytes, strict=True):
        shared = min(len(texts[k]), len(text))
        check_bytes(texts[k][:shared], text[:shared], where=f"turn {k}")
    return _aligned(transcript, [(k, rendered[k]) for k in segment_of], theirs, sampled)


def _sampled(transcript: Transcript, student: Renderer) -> Bools:
    """Which ids the student wrote, `[n]`: each turn to its first stop. Engines pad behind it."""
    result = np.zeros(len(transcript.ids), dtype=np.bool_)
    for low, high in transcript.turns:
        stops = np.flatnonzero(np.isin(transcript.ids[low:high], student.stop_ids))
        result[low : low + int(stops[0]) + 1 if len(stops) else high] = True
    return result


def _turn(student: Renderer, ids: Ints) -> Rendered:
    """A sampled run by itself: one segment, no prompt. What follows a control token other than a stop is left out: no
    text of another model's holds it, and what comes after it was written behind something that nobody else reads."""
    outside = np.flatnonzero((ids < 0) | (ids >= len(student.vocabulary)))
    if len(outside):
        at = int(outside[0])
        raise VocabularyError(
            f"Token {at} of a sampled turn has id {ids[at]}, which is not in the student's vocabulary of "
            f"{len(student.vocabulary)}. It is a mask value such as -100, or the ids are another model's: pass the ids "
            "that this student sampled."
        )
    stopped = len(ids) > 0 and ids[-1] in student.stop_ids
    controls = np.flatnonzero(student.vocabulary.control[ids[:-1] if stopped else ids])
    return student.from_sampled(
        Conversation(None), ids[: controls[0]] if len(controls) else ids, prompt_ids=_NOTHING, thinking=False
    )


def _teacher_side(
    transcript: Transcript, turns: list[Rendered], student: Renderer, teacher: Renderer, segments: int
) -> Rendered:
    """The teacher's rendering, with only the sampled turns as segments."""
    written = [r.segment_bytes[0].decode("utf-8") for r in turns]
    messages: list[dict[str, Any]] = []
    for k, between in enumerate(transcript.messages):
        messages += [dict(m) for m in between]
        if k < len(written) - 1:
            messages.append({"role": "assistant", "content": written[k]})
    conversation = Conversation(tuple(messages), tools=transcript.tools)  # type: ignore[arg-type]
    thinking = student.opens_thinking(conversation)
    if thinking and len(turns) > 1:
        raise RenderingError(
            f"The student's template opens a think block before each of the {len(turns)} sampled turns, expected one "
            "turn or none opened: earlier turns would begin in the middle of a thought for the teacher. Project the "
            "turns one at a time."
        )
    many = segments > 1
    result = teacher.render(
        conversation, written[-1], stopped=turns[-1].stopped[0], thinking=thinking, score="all" if many else "last"
    )
    return _last_segments(result, segments)


def _last_segments(rendered: Rendered, count: int) -> Rendered:
    """The same with its last `count` segments: turns before them were not sampled."""
    first = len(rendered.segment_bytes) - count
    if not first:
        return rendered
    segment = np.where(rendered.segment >= first, rendered.segment - first, -1).astype(np.int32)
    return replace(
        rendered,
        segment=segment,
        end=np.where(segment >= 0, rendered.end, 0),
        segment_bytes=rendered.segment_bytes[first:],
        stopped=rendered.stopped[first:],
    )


def _with_own_tokens(theirs: Rendered, turns: list[Rendered]) -> Rendered:
    """The teacher's rendering with the student's very tokens as content: with equal vocabularies it can read them."""
    low, parts = 0, []
    for number, own in enumerate(turns):
        content = np.flatnonzero((theirs.segment == number) & (theirs.roles != Role.STOP))
        mine = np.flatnonzero((own.segment >= 0) & (own.roles != Role.STOP))
        if not len(content):
            continue
        parts += [_cut(theirs, slice(low, int(content[0]))), _cut(own, mine, number)]
        low = int(content[-1]) + 1
    parts.append(_cut(theirs, slice(low, None)))
    joined: Any = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return replace(theirs, **joined)


def _cut(rendered: Rendered, at: slice | Ints, segment: int | None = None) -> dict[str, NDArray[Any]]:
    """Some tokens of a rendering, all of one segment if it is named."""
    result = {name: getattr(rendered, name)[at] for name in ("ids", "roles", "segment", "end", "exact")}
    if segment is not None:
        result["segment"] = np.full_like(result["segment"], segment)
    return result


def _aligned(transcript: Transcript, turns: list[tuple[int, Rendered]], theirs: Rendered, sampled: Bools) -> Reading:
    places, ends, segments, exact, stops = [], [], [], [], []
    for number, (k, own) in enumerate(turns):
        scored = own.scored
        places.append(scored + transcript.turns[k][0])
        ends.append(own.end[scored])
        segments.append(np.full(len(scored), number, dtype=np.int64))
        exact.append(own.exact[scored])
        stops.append(own.roles[scored] == Role.STOP)
    place_s, place_t = np.concatenate(places), theirs.scored
    mine = Side(np.concatenate(ends), np.concatenate(segments), np.concatenate(exact), np.concatenate(stops))
    stop_t = theirs.roles[place_t] == Role.STOP
    other = Side(theirs.end[place_t], theirs.segment[place_t].astype(np.int64), theirs.exact[place_t], stop_t)
    both = zip((turn.segment_bytes[0] for _, turn in turns), theirs.segment_bytes, strict=False)
    texts = [min(text, read, key=len) for text, read in both]
    texts += [b""] * (len(turns) - len(texts))
    written = Written(
        WrittenSide(transcript.ids[place_s], mine.end, mine.segment, mine.exact, mine.stop),
        WrittenSide(theirs.ids[place_t].astype(np.int64), other.end, other.segment, other.exact, other.stop),
        align(mine, other, len(turns)),
        texts,
    )
    num_bytes = sum(len(turn.segment_bytes[0]) for _, turn in turns)
    return Reading(transcript.ids, theirs.ids, place_s, place_t, written, num_bytes, sampled)
