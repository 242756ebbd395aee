"""One sample as both models read it: the student's ids as written, the teacher's own rendering of the same bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from diglot.alignment import check_bytes
from diglot.arrays import Bools, Floats, Ids
from diglot.batches.by_id import scored_by_id, unscored
from diglot.data import Sample
from diglot.errors import DataError
from diglot.rendering import Conversation, Rendered, Renderer, Reply, Role, Score, text_reply, truncate
from diglot.rendering.template import content_text, without_empty_thinking


@dataclass(frozen=True)
class ReadPair:
    """One sample on both sides. Segment `k` of the one is segment `k` of the other."""

    conversation: Conversation
    student: Rendered
    teacher: Rendered
    noncanonical: Bools  # of each scored student token: would its tokenizer have cut the text otherwise?
    sampler_logps: Floats | None = None  # of the same, nats: what the engine that sampled them said

    def with_logps(self, logps: Floats) -> ReadPair:
        """The same with what the engine said about the ids of the completion, of which some are scored."""
        return replace(self, sampler_logps=logps[self.student.scored - self.student.prompt_length])


class PairReader:
    """Renders samples for student and teacher.

    Args:
        same_vocabulary: feed the teacher the student's very ids instead of re-encoding their bytes.
        max_length: longest input of the student in its own tokens; ends are cut, fronts never.
        teacher_max_length: the same of the teacher.
        score_turns: "last" or "all" assistant turns.
        teacher_system: a text that the teacher alone reads, before everything else.
    """

    def __init__(
        self,
        student: Renderer,
        teacher: Renderer,
        *,
        same_vocabulary: bool,
        max_length: int | None = None,
        teacher_max_length: int | None = None,
        score_turns: Score = "last",
        teacher_system: str | None = None,
    ) -> None:
        self.student, self.teacher = student, teacher
        self.same_vocabulary = same_vocabulary
        self.max_length, self.teacher_max_length = max_length, teacher_max_length
        self.score_turns, self.teacher_system = score_turns, teacher_system
        self.label: str | None = None  # of this teacher, where rows say which of several reads them
        self.others: tuple[PairReader, ...] = ()  # of the other teachers, which compare the same tokens of the student
        self.dropped: Counter[str] = Counter()  # reason -> samples, since the last `take_dropped`

    def take_dropped(self) -> Counter[str]:
        """How many samples were dropped for which reason since the last call."""
        dropped, self.dropped = self.dropped, Counter()
        return dropped

    def _is_others(self, conversation: Conversation) -> bool:
        return None not in (self.label, conversation.route) and self.label != conversation.route

    def _sides(self, conversation: Conversation) -> tuple[Renderer, ...]:
        """All that read the text. Where one of them needs it in parts all have it so: the student is run once."""
        return (self.student, *(one.teacher for one in self._readers(conversation)))

    def teacher_reads(self, conversation: Conversation) -> Conversation:
        """The conversation as the teacher is given it."""
        return teacher_reads(conversation, self.teacher_system)

    def prompt_ids(self, conversation: Conversation, room: int, *, counted: bool = True) -> Ids | None:
        """The student's prompt, or None (and `counted`) if it leaves less than `room` tokens of `max_length`."""
        ids = self.student.prompt_ids(conversation)
        if self.max_length is not None and len(ids) + room > self.max_length:
            self.dropped["prompt_too_long"] += counted
            return None
        return ids

    def sampled(
        self, conversation: Conversation, completion_ids: Ids, prompt_ids: Ids | None = None
    ) -> ReadPair | None:
        """A completion that the student wrote: its ids stay as they are. None if another teacher is to read it."""
        if self._is_others(conversation):
            return None
        completion_ids = self._readable(conversation, completion_ids)
        student = self.student.from_sampled(conversation, completion_ids, prompt_ids=prompt_ids)
        thinking, reads = self.student.opens_thinking(conversation), self.teacher_reads(conversation)
        reply, finished = student.reply, student.stopped[-1]
        assert reply is not None
        by_id = self._all_read_ids(conversation)
        apart = [] if by_id else self._sides(conversation)[1:]
        if self.same_vocabulary:
            apart = [one for one in apart if one is not self.teacher]
        split = reply.whole is not None and any(has_other_markup(one, reply, thinking, finished) for one in apart)
        if split:
            student = self.student.from_sampled(conversation, completion_ids, prompt_ids=prompt_ids, split=True)
        if self.same_vocabulary:
            student = replace(student, exact=student.exact | (student.segment >= 0))  # both sides read the same ids
            own = self.teacher.as_written(reads, student, thinking=thinking)
            odd = self._noncanonical(student)
            if by_id and unscored(student):
                stopped = int(student.ids[-1]) in self.student.stop_ids
                own, odd = scored_by_id(self.teacher, own, student, stopped), _of_all(odd, student)
                student = scored_by_id(self.student, student, student, stopped)
            return self._fit(conversation, student, own, odd)
        if split:
            reply = replace(reply, whole=None)
        if reply.is_plain or reply.whole is not None:
            text = student.segment_bytes[-1].decode("utf-8")
            own = self.teacher.render(reads, text, stopped=finished, thinking=thinking)
        else:
            own = self.teacher.render(reads, reply, stopped=finished, thinking=False)
        return self._fit(conversation, student, own, self._noncanonical(student))

    def _readable(self, conversation: Conversation, ids: Ids) -> Ids:
        """The ids before the first that a teacher who reads ids does not have: padding of a wider student's embedding.

        Its rows are no tokens, but a student that samples gives them some probability.
        """
        known = [len(one.teacher.vocabulary) for one in self._readers(conversation) if one.same_vocabulary]
        if not known:
            return ids
        unknown = np.flatnonzero(np.asarray(ids) >= min(known))
        return ids[: unknown[0]] if len(unknown) else ids

    def _all_read_ids(self, conversation: Conversation) -> bool:
        """Do all teachers that compare this text read the student's very ids? They share one row of scored tokens."""
        return all(one.same_vocabulary for one in self._readers(conversation))

    def _readers(self, conversation: Conversation) -> tuple[PairReader, ...]:
        """The readers of all teachers that compare this text."""
        return (self, *(self.others if conversation.route is None else ()))

    def _noncanonical(self, sampled: Rendered) -> Bools:
        """Which scored tokens of a completion the student's own tokenizer does not give for its text.

        A token is canonical if the encoding of the whole text has the same id for the same bytes. Stop always is.
        """
        flags = [np.zeros(0, np.bool_)]
        texts = self.student.encoder.encode([text.decode("utf-8") for text in sampled.segment_bytes])
        stride = len(self.student.vocabulary) + 1
        for segment, own in enumerate(texts):
            inside = sampled.segment == segment
            ids, ends, stop = sampled.ids[inside], sampled.end[inside], sampled.roles[inside] == Role.STOP
            starts, own_starts = (np.concatenate([[0], e[:-1]]) if len(e) else e for e in (ends, own.ends))
            # One number for (start, id); the end follows from them where the token is exact.
            same = np.isin(starts * stride + ids, (own_starts * stride + own.ids)[own.exact])
            flags.append(~same & ~stop)
        return np.concatenate(flags)

    def written(self, sample: Sample, *, stopped: bool = True) -> ReadPair | None:
        """A completion that somebody else wrote, as text: each side encodes it. None: another teacher is to read it."""
        if self._is_others(sample.conversation):
            return None
        if sample.reply is None:
            raise DataError(
                f"{sample.where} has no completion. Train on-policy (lmbda=1) or let the teacher write (seq_kd)."
            )
        conversation, reads = sample.conversation, self.teacher_reads(sample.conversation)
        if conversation.teacher_view is not None and self.score_turns == "all":
            raise DataError(
                f"{sample.where} has a `teacher_prompt` and score_turns is 'all': earlier turns would not be the same "
                "on both sides. Use score_turns='last', or give the row without it."
            )
        for side in (self.student, self.teacher):
            check_fields(side, sample)
        reply, thinking = self._as_both_read(sample, stopped)
        student, teacher = (
            side.render(one, reply, stopped=stopped, score=self.score_turns, thinking=thinking)
            for side, one in ((self.student, conversation), (self.teacher, reads))
        )
        if self.same_vocabulary:
            student, teacher = _same_ids_are_exact(student, teacher)
        return self._fit(conversation, student, teacher, np.zeros(len(student.scored), np.bool_))

    def _as_both_read(self, sample: Sample, stopped: bool) -> tuple[str | Reply, bool]:
        """A reply as one text, where both sides spell it alike, else its parts; and does it start in a think block?"""
        opened = self.student.opens_thinking(sample.conversation)
        reply = sample.answer
        if reply is None:
            text = str(sample.reply)
            opened = opened and "<think>" not in text and ("</think>" in text or not stopped)
            reply = text_reply(text, opened=opened)
        if reply.is_plain:
            return reply.slots[0].texts[0], opened and reply.whole is not None and sample.answer is None
        if reply.whole is not None:
            split = any(has_other_markup(side, reply, opened, stopped) for side in self._sides(sample.conversation))
            if split:
                return replace(reply, whole=None), False
            return self._inside(sample, reply.whole, opened)
        for side in self._sides(sample.conversation):
            side.note_common(reply.shape)
        sides = [side.markup for side in self._sides(sample.conversation)]
        spelt = {without_empty_thinking(side.layout(reply.shape).spelt(reply)) for side in sides}
        if len(spelt) > 1 or any(side.has_controls(reply.shape) for side in sides):
            return reply, False
        return self._inside(sample, spelt.pop(), False)

    def _inside(self, sample: Sample, text: str, opened: bool) -> tuple[str, bool]:
        """A text without the tag that the student's prompt holds already."""
        tag = "<think>\n"
        if not opened and text.startswith(tag) and self.student.opens_thinking(sample.conversation):
            return text.removeprefix(tag), True
        return text, opened

    def reference(self, sample: Sample) -> Rendered | None:
        """A text to imitate, on the student's side only; None (and counted) if its prompt alone fills the limit."""
        if sample.reply is None:
            raise DataError(
                f"{sample.where} has no completion to imitate. Give rows with a completion, messages or text."
            )
        check_fields(self.student, sample)
        reply = sample.answer or sample.reply
        rendered = self.student.render(sample.conversation, reply, score=self.score_turns)
        try:
            return truncate(rendered, self.max_length) if self.max_length else rendered
        except DataError:
            self.dropped["prompt_too_long"] += 1
            return None

    def _fit(
        self, conversation: Conversation, student: Rendered, teacher: Rendered, noncanonical: Bools
    ) -> ReadPair | None:
        """Cut both sides to their limits; a prompt that fills a limit alone drops the sample and is counted."""
        try:
            cut_student = truncate(student, self.max_length) if self.max_length else student
            cut_teacher = truncate(teacher, self.teacher_max_length) if self.teacher_max_length else teacher
        except DataError:
            self.dropped["prompt_too_long"] += 1
            return None
        for of_student, of_teacher in zip(cut_student.segment_bytes, cut_teacher.segment_bytes, strict=False):
            shared = min(len(of_student), len(of_teacher))
            check_bytes(of_student[:shared], of_teacher[:shared], where="student and teacher")
        return ReadPair(conversation, cut_student, cut_teacher, noncanonical[: len(cut_student.scored)])


def _of_all(values: Bools, written: Rendered) -> Bools:
    """Values of the scored tokens for all tokens of the reply; False for the others."""
    of_all = np.zeros(len(written.ids), dtype=np.bool_)
    of_all[written.scored] = values
    return of_all[written.prompt_length :]


def has_other_markup(side: Renderer, reply: Reply, opened: bool, finished: bool) -> bool:
    """Does this side's template write the parts of a reply in another way than its writer did?

    Args:
        opened: was the think block opened before the reply?
        finished: did the writer finish? If not, the closing markup is still to come.
    """
    if reply.is_plain or not side.has_template:
        return False
    layout = side.markup.layout(reply.shape)
    if layout.common and {*layout.common, Role.CONTENT} >= set(reply.shape):
        return False
    own = without_empty_thinking(layout.spelt(reply))
    written = ("<think>\n" if opened else "") + str(reply.whole)
    return side.markup.has_controls(reply.shape) or not (own == written if finished else own.startswith(written))


def check_fields(side: Renderer, sample: Sample) -> None:
    """Raise `DataError` for fields of the scored message that this side's template reads and that cannot be scored."""
    read = [name for name in (sample.answer.others if sample.answer else ()) if side.template.reads(name)]
    if read:
        raise DataError(
            f"{sample.where}: the last message has {read}, which the {side.name}'s chat template reads beside its "
            "content, and which cannot be scored. Leave these fields out, or leave the row out."
        )


def _same_ids_are_exact(student: Rendered, teacher: Rendered) -> tuple[Rendered, Rendered]:
    """With one vocabulary, equal tokens may be compared also where they hold bytes of the markup before them."""
    scored_s, scored_t = student.scored, teacher.scored
    if len(scored_s) != len(scored_t) or (student.ids[scored_s] != teacher.ids[scored_t]).any():
        return student, teacher
    exact_s, exact_t = student.exact.copy(), teacher.exact.copy()
    starts = (side.segment[scored] for side, scored in ((student, scored_s), (teacher, scored_t)))
    first_s, first_t = (np.diff(segment, prepend=-1) != 0 for segment in starts)
    for exact, scored, first in ((exact_s, scored_s, first_s), (exact_t, scored_t, first_t)):
        exact[scored[first]] = True
    return replace(student, exact=exact_s), replace(teacher, exact=exact_t)


def teacher_reads(conversation: Conversation, system: str | None) -> Conversation:
    """The conversation as a teacher is given it: its own prompt if the row has one, and first its own system text."""
    view = conversation.teacher_view or conversation
    if not system:
        return view
    if view.messages is None:
        return replace(view, text=f"{system}\n\n{view.text}")
    first, rest, text = view.messages[0], view.messages, system
    if first["role"] == "system":
        text, rest = f"{text}\n\n{content_text(first, 'the system message')}", rest[1:]
    return replace(view, messages=({"role": "system", "content": text}, *rest))
