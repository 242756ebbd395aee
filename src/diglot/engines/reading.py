"""One transcript as both models read it: the student's ids as they stand, the teacher's own rendering, aligned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diglot.alignment import Alignment, Side, align, check_bytes
from diglot.arrays import Bools, Ints
from diglot.batches import Written, WrittenSide
from diglot.engines.transcript import Transcript, check_ids
from diglot.errors import RenderingError
from diglot.rendering import Conversation, Rendered, Renderer, Role, truncate
from diglot.rendering.markup import MARKERS, PLAIN
from diglot.rendering.types import Reply

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
        RenderingError: the teacher's template refuses the conversation, or drops a sampled turn; a student without a
            chat template that writes its reply in channels, or one that does so in several turns.
        VocabularyError: an id that is not the student's.
    """
    sampled = _sampled(transcript, student)
    check_ids(transcript.ids, student.vocabulary, sampled)
    ids = [transcript.ids[low:high][sampled[low:high]] for low, high in transcript.turns]
    last = len(ids) - 1
    rendered = [_turn(student, one, k, thinking=False) for k, one in enumerate(ids[:-1])]
    _check_parts(rendered, student)
    conversation = _conversation(transcript, rendered)
    thinking = student.opens_thinking(conversation)
    if thinking and last:
        raise RenderingError(
            f"The student's template opens a think block before each of the {len(ids)} sampled turns, expected one "
            "turn or none opened: earlier turns would begin in the middle of a thought for the teacher. Project the "
            "turns one at a time."
        )
    rendered.append(_turn(student, ids[-1], last, thinking))
    segments = [  # a turn without text is no segment
        Segment(k, own, number)
        for k, own in enumerate(rendered)
        for number, text in enumerate(own.segment_bytes)
        if text or k == last
    ]
    reply, stopped = rendered[-1].reply, rendered[-1].stopped[-1]
    assert reply is not None
    theirs = teacher.render(
        conversation,
        rendered[-1].segment_bytes[0].decode("utf-8") if _is_text(reply) else reply,
        stopped=stopped,
        thinking=thinking and _is_text(reply),
        score="all" if segments[0].turn < last else "last",
    )
    theirs = _last_segments(theirs, len(segments))
    if student.vocabulary.same_as(teacher.vocabulary):
        theirs = _with_own_tokens(theirs, segments)
    if teacher_max_length is not None:
        theirs = truncate(theirs, teacher_max_length)
    for segment, read_as in zip(segments, theirs.segment_bytes, strict=True):
        shared = min(len(segment.text), len(read_as))
        check_bytes(segment.text[:shared], read_as[:shared], where=f"turn {segment.turn}")
    return _aligned(transcript, segments, theirs, sampled)


@dataclass(frozen=True)
class Segment:
    """A run of text of a sampled turn; a turn that is written in parts has several."""

    turn: int
    own: Rendered  # of the turn, its ids alone
    number: int  # among the turn's

    @property
    def text(self) -> bytes:
        """Its bytes."""
        return self.own.segment_bytes[self.number]


def _sampled(transcript: Transcript, student: Renderer) -> Bools:
    """Which ids the student wrote, `[n]`: each turn to its first stop. Engines pad behind it."""
    result = np.zeros(len(transcript.ids), dtype=np.bool_)
    for low, high in transcript.turns:
        stops = np.flatnonzero(np.isin(transcript.ids[low:high], student.stop_ids))
        result[low : low + int(stops[0]) + 1 if len(stops) else high] = True
    return result


def _turn(student: Renderer, ids: Ints, number: int, thinking: bool) -> Rendered:
    """A sampled run by itself, no prompt: one segment, or one for each part where control tokens stand between them, as
    in channels. What follows a control token in no such markup, other than a stop, is left out: no text of another
    model's holds it, and what comes after it was written behind something that nobody else reads. In a reply with
    several parts it is left out at the end of one that was cut alone, where it may be the markup of a part to come;
    elsewhere it is an edge, as in the trainers: the teacher reads its name, and what stands behind it is scored."""
    while True:
        written = student.from_sampled(Conversation(None), ids, prompt_ids=_NOTHING, thinking=thinking)
        reply = written.reply
        assert reply is not None
        edges = reply.slots[-1].edges
        if not edges or (reply.shape != PLAIN and written.stopped[-1]):
            return written
        controls = np.flatnonzero(student.vocabulary.control[ids])
        name = student.vocabulary.names.get(int(ids[controls[0]]))
        if name in MARKERS and not student.has_template:
            raise RenderingError(
                f"Token {controls[0]} of sampled turn {number} is {name!r}, which marks a part of a reply, and the "
                "student's tokenizer has no chat template, which says what the parts are. Load the tokenizer with its "
                "template, or set tokenizer.chat_template."
            )
        ids = ids[: controls[-len(edges)]]  # not before the first edge: a stop comes behind them


def _is_text(reply: Reply) -> bool:
    """Is it handed to the teacher as one text, with its tags as they are?"""
    return reply.whole is not None or reply.shape == PLAIN


def _check_parts(earlier: list[Rendered], student: Renderer) -> None:
    """`RenderingError` if an earlier turn has parts: templates leave the reasoning of earlier turns out."""
    for k, turn in enumerate(earlier):
        if turn.reply is not None and not _is_text(turn.reply):
            names = [role.name.lower().replace("_", " ") for role in dict.fromkeys(turn.reply.shape)]
            raise RenderingError(
                f"Sampled turn {k} of {len(earlier) + 1} has {' and '.join(names)} between control tokens of the "
                f"{student.name}, expected such parts in the last turn alone: no template writes all of them in "
                "earlier ones. Project the turns one at a time, each with the messages before it."
            )


def _conversation(transcript: Transcript, earlier: list[Rendered]) -> Conversation:
    """All that stands before the last sampled turn."""
    messages: list[dict[str, Any]] = []
    for k, between in enumerate(transcript.messages):
        messages += [dict(m) for m in between]
        if k < len(earlier):
            messages.append({"role": "assistant", "content": earlier[k].segment_bytes[0].decode("utf-8")})
    return Conversation(tuple(messages), tools=transcript.tools)  # type: ignore[arg-type]


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


def _with_own_tokens(theirs: Rendered, segments: list[Segment]) -> Rendered:
    """The teacher's rendering with the student's very tokens as content: with equal vocabularies it can read them."""
    low, parts = 0, []
    for at, segment in enumerate(segments):
        own = segment.own
        content = np.flatnonzero((theirs.segment == at) & (theirs.roles != Role.STOP))
        mine = np.flatnonzero((own.segment == segment.number) & (own.roles != Role.STOP))
        if not len(content):
            continue
        parts += [_cut(theirs, slice(low, int(content[0]))), _cut(own, mine, at)]
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


def _aligned(transcript: Transcript, own: list[Segment], theirs: Rendered, sampled: Bools) -> Reading:
    places, ends, segments, exact, stops = [], [], [], [], []
    for at, one in enumerate(own):
        scored = np.flatnonzero(one.own.segment == one.number)
        places.append(scored + transcript.turns[one.turn][0])
        ends.append(one.own.end[scored])
        segments.append(np.full(len(scored), at, dtype=np.int64))
        exact.append(one.own.exact[scored])
        stops.append(one.own.roles[scored] == Role.STOP)
    place_s, place_t = np.concatenate(places), theirs.scored
    mine = Side(np.concatenate(ends), np.concatenate(segments), np.concatenate(exact), np.concatenate(stops))
    stop_t = theirs.roles[place_t] == Role.STOP
    other = Side(theirs.end[place_t], theirs.segment[place_t].astype(np.int64), theirs.exact[place_t], stop_t)
    both = zip((one.text for one in own), theirs.segment_bytes, strict=False)
    texts = [min(text, read, key=len) for text, read in both]
    texts += [b""] * (len(own) - len(texts))
    written = Written(
        WrittenSide(transcript.ids[place_s], mine.end, mine.segment, mine.exact, mine.stop),
        WrittenSide(theirs.ids[place_t].astype(np.int64), other.end, other.segment, other.exact, other.stop),
        align(mine, other, len(own)),
        texts,
    )
    num_bytes = sum(len(one.text) for one in own)
    return Reading(transcript.ids, theirs.ids, place_s, place_t, written, num_bytes, sampled)
