"""Where a student's turns are in its ids: found by its template, and believed if rendering gives the ids back.

An engine sends ids and nothing else. What the template writes around contents is learnt from a few probes; ids are cut
at these marks, and the conversation that comes out is rendered again. What is around the turns must then be the very
ids that were sent. So a wrong guess is found out, whatever the template does.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np

from diglot.arrays import Ints
from diglot.engines.transcript import Transcript, as_ids, check_ids
from diglot.errors import DataError, RenderingError
from diglot.rendering import Conversation, Renderer
from diglot.vocabulary import Vocabulary

# Roles of the probes. The last message of each is followed by the generation prompt.
_PROBES = (
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
    ("user", "assistant", "tool", "assistant", "user"),
    ("user", "assistant", "tool", "tool"),
    ("system", "user", "assistant", "tool"),
    ("user", "assistant", "tool"),
)
_SENTINEL = "SENTINELmark"
_MOST_MESSAGES = 2000  # of one context: rendering them again takes time that grows with their square
_OPEN, _CLOSE = b"\xff", b"\xfe"  # around the id of a control token: bytes that no text in UTF-8 has


class _Join(NamedTuple):
    mark: bytes  # what the template writes between two contents
    role: str  # of the second


class TurnFinder:
    """Finds the turns of one student. Immutable: threads may share it.

    Args:
        renderer: the student's, with the `chat_template_kwargs` that its engine uses.

    Raises:
        RenderingError: no chat template, or one in which no turn could be found.
    """

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        self._heads: dict[bytes, str] = {}  # what stands before the first content -> its role
        self._joins: dict[str, list[_Join]] = defaultdict(list)
        if not renderer.has_template:
            raise RenderingError(
                "The student has no chat template, so its turns cannot be found in its ids. Use the function "
                "`project_teacher_scores`, which is given them."
            )
        for roles in _PROBES:
            self._learn(roles)
        self._of_mark = {role: {j.mark: j for j in joins if j.mark} for role, joins in self._joins.items()}
        self._patterns = {
            role: re.compile(b"|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True)))
            for role, marks in self._of_mark.items()
            if marks
        }
        if not any(join.role == "assistant" for join in self._joins["user"]):
            raise RenderingError("The student's chat template renders none of the probes by which its turns are found.")

    def find(self, ids: Any) -> Transcript:
        """The turns of a whole context. All assistant turns count as sampled: ids alone do not say which were.

        A student whose template opens a think block before each turn has its last turn found only.

        Raises:
            DataError: ids that the template does not write so; the message names the position and both tokens.
            VocabularyError: an id that is not the student's.
        """
        ids = as_ids(ids)
        if not len(ids):
            raise DataError("There are no ids: send the whole context, prompt and completion.")
        check_ids(ids, self.renderer.vocabulary)
        between, turns = self._cut(ids)
        self._verify(ids, between, turns)
        if len(turns) > 1 and self.renderer.opens_thinking(self._conversation(ids, between, turns)):
            return self._only_last(ids, between, turns)
        return Transcript(ids, tuple(turns), tuple(tuple(m) for m in between))

    # ---- learning ----------------------------------------------------------------------------------------------

    def _learn(self, roles: tuple[str, ...]) -> None:
        """Marks of one probe; a template that refuses it, or moves its contents about, has none to give."""
        marks = [f"{_SENTINEL}{i}x" for i in range(len(roles))]
        messages = [{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)]
        try:
            text = self.renderer.template.text(messages, generation_prompt=True)
        except RenderingError:
            return
        parts = re.split("|".join(marks), text)
        if re.findall("|".join(marks), text) != marks:
            return
        spelt = [self._spell(self.renderer.encoder.encode_markup(part))[0] for part in parts]
        self._heads.setdefault(spelt[0], roles[0])
        for role, following, mark in zip(roles, [*roles[1:], "assistant"], spelt[1:], strict=True):
            if mark not in (join.mark for join in self._joins[role]):  # a user's stays a user's
                self._joins[role].append(_Join(mark, following))

    def _spell(self, ids: Ints) -> tuple[bytes, Ints]:
        """All ids as bytes, a control token as its number between two marks; and where each ends."""
        vocabulary: Vocabulary = self.renderer.vocabulary
        control = vocabulary.control
        parts = [
            _OPEN + int(i).to_bytes(4, "big") + _CLOSE if control[i] else vocabulary.token(i) for i in ids.tolist()
        ]
        return b"".join(parts), np.cumsum([len(p) for p in parts], dtype=np.int64)

    # ---- cutting -----------------------------------------------------------------------------------------------

    def _cut(self, ids: Ints) -> tuple[list[list[dict[str, str]]], list[tuple[int, int]]]:
        """Messages before each turn, and the turns as [first, last + 1)."""
        raw, ends = self._spell(ids)
        stops = np.flatnonzero(np.isin(ids, self.renderer.stop_ids))
        at, role = self._head(raw, ids)
        between: list[list[dict[str, str]]] = [[]]
        turns: list[tuple[int, int]] = []
        for _ in range(_MOST_MESSAGES):
            if role == "assistant":
                turns.append(self._turn(at, ends, stops))
                last = turns[-1][1]
                if last == len(ids) or self._is_tail(raw[ends[last - 1] :], ids[last - 1]):
                    return between, turns
                between.append([])
                low = int(ends[last - 2]) if last >= 2 else 0
                result = self._starting(raw, low, role)
                if result is None:
                    raise DataError(
                        f"Position {last - 1}: behind the assistant's turn that ends with "
                        f"{self._shown(ids, last - 1)} the student's template writes something else than what was sent "
                        f"({self._shown(ids, last)} comes next)."
                    )
                at, role = low + len(result.mark), result.role
                continue
            place, result = self._next(raw, at, role)
            if result is None:
                token = int(np.searchsorted(ends, at, side="right"))
                raise DataError(
                    f"Position {min(token, len(ids) - 1)}: no assistant turn begins after this {role} message. Send "
                    "the prompt as the student's template writes it, generation prompt included."
                )
            between[-1].append({"role": role, "content": self._content(raw[at:place], role, ends, at)})
            at, role = place + len(result.mark), result.role
        raise DataError(
            f"There are more than {_MOST_MESSAGES} messages in {len(ids)} ids: score them in several parts."
        )

    def _head(self, raw: bytes, ids: Ints) -> tuple[int, str]:
        fitting = [head for head in self._heads if raw.startswith(head)]
        if not fitting:
            known = max(self._heads, key=lambda head: _common(raw, head))
            ends = self._spell(ids)[1]
            token = min(int(np.searchsorted(ends, _common(raw, known), side="right")), len(ids) - 1)
            raise DataError(
                f"Position {token}: {self._shown(ids, token)} is not how the student's template begins a conversation."
            )
        longest = max(fitting, key=len)
        return len(longest), self._heads[longest]

    def _next(self, raw: bytes, at: int, role: str) -> tuple[int, _Join | None]:
        """The first mark at or after `at`, the longest of several that start there. One pass, whatever is in `raw`."""
        match = self._patterns[role].search(raw, at) if role in self._patterns else None
        return (len(raw), None) if match is None else (match.start(), self._of_mark[role][match.group()])

    def _starting(self, raw: bytes, at: int, role: str) -> _Join | None:
        fitting = [j for j in self._joins[role] if j.mark and raw.startswith(j.mark, at)]
        return max(fitting, key=lambda j: len(j.mark), default=None)

    def _turn(self, at: int, ends: Ints, stops: Ints) -> tuple[int, int]:
        """From the token that starts at byte `at` to the next stop, or to the end."""
        first = int(np.searchsorted(ends, at, side="right"))  # tokens that end at or before `at`
        later = int(np.searchsorted(stops, first))
        return first, int(stops[later]) + 1 if later < len(stops) else len(ends)

    def _is_tail(self, rest: bytes, stop: int) -> bool:
        """Is `rest` no more than what the template writes between a stop and what comes next?"""
        mark = self._spell(np.array([stop]))[0]
        return any(j.mark.startswith(mark + rest) for j in self._joins["assistant"])

    def _content(self, raw: bytes, role: str, ends: Ints, at: int) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            token = int(np.searchsorted(ends, at + error.start, side="right"))
            raise DataError(
                f"Position {token}: a {role} message holds a control token or bytes that are no text. Its text cannot "
                "be given to the teacher."
            ) from None

    # ---- verifying ---------------------------------------------------------------------------------------------

    def _conversation(
        self, ids: Ints, between: list[list[dict[str, str]]], turns: list[tuple[int, int]]
    ) -> Conversation:
        messages: list[dict[str, str]] = []
        for k, before in enumerate(between):
            messages += before
            if k < len(turns) - 1:
                messages.append({"role": "assistant", "content": self._text(ids, turns[k])})
        return Conversation(tuple(messages))

    def _text(self, ids: Ints, turn: tuple[int, int]) -> str:
        content = ids[turn[0] : turn[1]]
        return self.renderer.vocabulary.bytes_of(content).decode("utf-8", "replace")

    def _verify(self, ids: Ints, between: list[list[dict[str, str]]], turns: list[tuple[int, int]]) -> None:
        """Everything around the turns, rendered again, must be the very ids. A turn's own ids are the student's."""
        conversation = self._conversation(ids, between, turns)
        assert conversation.messages is not None
        try:
            texts, _ = self.renderer.template.pieces(conversation.messages, tools=None)
        except RenderingError as error:
            raise DataError(f"The conversation that was found in the ids cannot be rendered again: {error}") from error
        low = 0
        written = [turn for k, turn in enumerate(turns) if k == len(turns) - 1 or self._text(ids, turn)]
        for text, turn in zip(texts, written, strict=True):
            self._same(ids, low, turn[0], text)
            low = turn[1] - 1  # the stop is the template's to write, too

    def _same(self, ids: Ints, low: int, high: int, text: str) -> None:
        own = self.renderer.encoder.encode_markup(text)
        if np.array_equal(own, ids[low:high]):
            return
        plain = np.asarray(self.renderer.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
        if np.array_equal(plain, ids[low:high]):  # some tokenizers put a space before a text
            return
        shorter = min(len(own), high - low)
        differs = np.flatnonzero(own[:shorter] != ids[low : low + shorter])
        at = int(differs[0]) if len(differs) else shorter
        theirs = self._shown(ids, low + at) if low + at < high else "the student's turn begins"
        mine = self._shown(own, at) if at < len(own) else "the student's turn begins"
        raise DataError(
            f"Position {low + at}: {theirs} was sent, and the student's template writes {mine} there. Its turns are "
            "not sure, so nothing was scored. Use the same template and its arguments as the engine that sampled."
        )

    def _only_last(self, ids: Ints, between: list[list[dict[str, str]]], turns: list[tuple[int, int]]) -> Transcript:
        messages = self._conversation(ids, between, turns).messages
        assert messages is not None
        return Transcript(ids, (turns[-1],), (messages,))

    def _shown(self, ids: Ints, at: int) -> str:
        if at >= len(ids):
            return "nothing"
        return f"{self.renderer.vocabulary.display(int(ids[at]))!r} (id {ids[at]})"


def _common(a: bytes, b: bytes) -> int:
    """How many bytes both begin with."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
