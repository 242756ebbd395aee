"""What one model's template writes around the parts of a reply, and those parts found again in what the model wrote.

What stands around a part is found by rendering sentinels in its place. Where a template has no way to write a part,
the common one stands in: `<think>` for reasoning, Hermes' `<tool_call>` for calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diglot.errors import RenderingError
from diglot.rendering.reply import REASONING_FIELDS
from diglot.rendering.template import Template, without_empty_thinking, without_thinking
from diglot.rendering.types import Reply, Role, Shape
from diglot.vocabulary import Vocabulary

Ids = NDArray[np.int64]

PROBE = {"role": "user", "content": "hi"}
_KEY, _VALUE = "SENTINELkey", "SENTINELvalue"
PLAIN: Shape = (Role.CONTENT,)
CALL: Shape = (Role.TOOL_CALL, Role.TOOL_CALL)
_MOST_CALLS = 64


@dataclass(frozen=True)
class Layout:
    """The text around the slots of a reply of one shape: one more piece than there are slots."""

    around: tuple[str, ...]  # what follows the generation prompt first; what precedes the stop last
    own: bool  # does the template write it, or is it the common way?
    bare: bool = False  # it follows the generation prompt without any think block
    stop: int | None = None  # the id that ends a reply of this shape

    def spelt(self, reply: Reply) -> str:
        """The reply of this shape as one text; control tokens of the markup by their names."""
        return self.around[0] + "".join(
            "".join(slot.texts) + after for slot, after in zip(reply.slots, self.around[1:], strict=True)
        )


class Markup:
    """Layouts of one model, by shape.

    Args:
        encode: text that continues another -> ids, special tokens recognised.
        stops: the ids that end a turn.
    """

    def __init__(
        self, template: Template, vocabulary: Vocabulary, encode: Callable[[str], Ids], stops: Sequence[int]
    ) -> None:
        self.template, self.vocabulary, self._encode, self._stops = template, vocabulary, encode, stops
        self._layouts: dict[Shape, Layout] = {}
        self._patterns: dict[tuple[Shape, bool, bool], re.Pattern[bytes]] = {}

    def layout(self, shape: Shape) -> Layout:
        """What stands around the slots of a reply."""
        if shape not in self._layouts:
            own = self._own(shape) if self.template.exists else None
            self._layouts[shape] = own or Layout(_common(shape), own=False)
        return self._layouts[shape]

    def has_controls(self, shape: Shape) -> bool:
        """Does this model write control tokens between the parts of such a reply?"""
        return any(self.vocabulary.control[self._encode(text)].any() for text in self.layout(shape).around)

    # ---- reading -----------------------------------------------------------------------------------------------

    def marked(self, ids: Ids) -> tuple[bytes, Ids]:
        """The bytes of `ids` with a mark that is no text for each control token, and where each id ends in them."""
        tokens = [b"\xff%d\xfe" % i if self.vocabulary.control[i] else self.vocabulary.token(i) for i in ids.tolist()]
        return b"".join(tokens), np.cumsum([len(token) for token in tokens], dtype=np.int64)

    def find(self, text: bytes, opened: bool, finished: bool) -> tuple[Shape, list[tuple[int, int]]]:
        """The shape of a reply in `marked` bytes, and the span of each slot.

        Args:
            opened: did the generation prompt open a think block?
            finished: did its writer finish it? If not, it may end in the middle of any part.
        """
        for shape in self._candidates(text, opened):
            for whole in (True, False)[not finished :]:
                if found := self._pattern(shape, opened, whole).match(text):
                    return shape, [found.span(k + 1) for k in range(len(shape))]
        if opened:
            return (Role.REASONING,), [(0, len(text))]
        return PLAIN, [(0, len(text))]

    def _candidates(self, text: bytes, opened: bool) -> list[Shape]:
        """Shapes in the order in which to try them; none with reasoning where the text cannot hold it."""
        thinks = opened or self._holds(text, (Role.REASONING, Role.CONTENT), 0)
        counts = range(min(self._count(text, (Role.TOOL_CALL,) * 2, 1), _MOST_CALLS), 0, -1)
        tails: list[Shape] = []
        for count in counts:
            calls = (Role.TOOL_CALL,) * (2 * count)
            tails += [calls, (Role.CONTENT, *calls)]
        tails.append(PLAIN)
        if not thinks:
            return tails
        return [(Role.REASONING, *tail) for tail in tails] + [(Role.REASONING,), *([] if opened else tails)]

    def _count(self, text: bytes, shape: Shape, at: int) -> int:
        core = self._marks(self.layout(shape).around[at]).strip()
        return text.count(core) if core else 0

    def _holds(self, text: bytes, shape: Shape, at: int) -> bool:
        core = self._marks(self.layout(shape).around[at]).strip()
        return bool(core) and text.lstrip().startswith(core)

    def _marks(self, literal: str) -> bytes:
        return self.marked(self._encode(literal))[0] if literal else b""

    def _pattern(self, shape: Shape, opened: bool, whole: bool) -> re.Pattern[bytes]:
        """The slots of a layout as groups. Whitespace at the edges of the markup may be missing."""
        key = (shape, opened, whole)
        if key not in self._patterns:
            around = [self._marks(text) for text in self.layout(shape).around]
            if opened and shape[0] == Role.REASONING:
                around[0] = b""
            slots = [b"(.*?)"] * (len(shape) - 1) + ([b"(.*?)"] if whole else [b"(.*)"])
            parts = [self._opening(self.layout(shape).around[0], around[0])]
            for slot, after in zip(slots, around[1:], strict=True):
                parts += [slot, _flexible(after)]
            if not whole:
                parts.pop()
            self._patterns[key] = re.compile(b"\\A" + b"".join(parts) + b"\\Z", re.S)
        return self._patterns[key]

    def _opening(self, literal: str, marks: bytes) -> bytes:
        """A pattern for what stands before the first slot: a model may leave out the empty think block."""
        rest = self._marks(without_empty_thinking(literal))
        before = marks.removesuffix(rest) if marks else b""
        return (b"(?:" + re.escape(before) + b")?" if before else b"") + _flexible(rest if before else marks)

    # ---- finding out -------------------------------------------------------------------------------------------

    def _own(self, shape: Shape) -> Layout | None:
        """What the template itself writes, or None if it has no way to write a reply of this shape."""
        prompt = self._try([PROBE], generation_prompt=True)
        if prompt is None:
            return None
        for message, marks in _probes(shape):
            text = self._try([PROBE, message], generation_prompt=False)
            if text is None or any(text.count(mark) != 1 for mark in marks):
                continue
            layout = self._cut(text, prompt, marks)
            if layout is not None:
                return layout
        return None

    def _try(self, messages: list[dict[str, Any]], generation_prompt: bool) -> str | None:
        try:
            return self.template.text(messages, generation_prompt=generation_prompt)
        except RenderingError:
            return None

    def _cut(self, text: str, prompt: str, marks: Sequence[str]) -> Layout | None:
        bare = without_thinking(prompt)
        for start in (prompt, bare):
            if not text.startswith(start):
                continue
            around, rest = [], text[len(start) :]
            for mark in marks:
                before, found, rest = rest.partition(mark)
                if not found:
                    return None
                around.append(before)
            closing, stop = self._closing(rest, calls=len(marks) > 1)
            return Layout((*around, closing), own=True, bare=start != prompt, stop=stop)
        return None

    def _closing(self, text: str, calls: bool) -> tuple[str, int | None]:
        """The text before the stop, and the stop. A turn of calls may end with a marker of its own."""
        ids = self._encode(text)
        stops = [i for i in ids.tolist() if i in self._stops] or (
            ids[self.vocabulary.control[ids]].tolist() if calls else []
        )
        if not stops:
            return "", None
        return text.partition(self.vocabulary.display(stops[0]))[0], stops[0]


def _probes(shape: Shape) -> list[tuple[dict[str, Any], list[str]]]:
    """Messages of this shape with sentinels in them, and the sentinels as a template writes them."""
    fields = REASONING_FIELDS if Role.REASONING in shape else ("",)
    forms = (True, False) if Role.TOOL_CALL in shape else (True,)
    return [_probe(shape, field, as_object) for field in fields for as_object in forms]


def _probe(shape: Shape, field: str, as_object: bool) -> tuple[dict[str, Any], list[str]]:
    message: dict[str, Any] = {"role": "assistant", "content": None if Role.TOOL_CALL in shape else ""}
    marks: list[str] = []
    for k, role in enumerate(shape):
        mark = f"SENTINELreply{k}x"
        if role == Role.REASONING:
            message[field] = mark
        elif role == Role.CONTENT:
            message["content"] = mark
        elif k and shape[k - 1] == Role.TOOL_CALL and len(message.get("tool_calls", [])) * 2 > _calls_before(shape, k):
            arguments = {f"{_KEY}{k}x": _VALUE} if as_object else mark
            message["tool_calls"][-1]["function"]["arguments"] = arguments
            mark = json.dumps(arguments) if as_object else mark
        else:
            number = _calls_before(shape, k) // 2
            call = {"id": f"call{number:05d}", "type": "function", "function": {"name": mark, "arguments": {}}}
            message.setdefault("tool_calls", []).append(call)
        marks.append(mark)
    return message, marks


def _calls_before(shape: Shape, k: int) -> int:
    return sum(role == Role.TOOL_CALL for role in shape[:k])


def _common(shape: Shape) -> tuple[str, ...]:
    """The common way to write a reply of this shape."""
    around, after = [], ""
    for k, role in enumerate(shape):
        if role == Role.REASONING:
            around.append(after + "<think>\n")
            after = "\n</think>\n\n"
        elif role == Role.CONTENT:
            around.append(after)
            after = ""
        elif _calls_before(shape, k) % 2 == 0:
            between = "\n" if k and shape[k - 1] != Role.REASONING else ""
            around.append(after + between + '<tool_call>\n{"name": "')
            after = ""
        else:
            around.append('", "arguments": ')
            after = "}\n</tool_call>"
    return (*around, after.rstrip() if shape[-1] == Role.REASONING else after)


def _flexible(literal: bytes) -> bytes:
    """A pattern for markup of which whitespace at either end may be missing."""
    core = literal.strip()
    if not core:
        return _optional(literal)
    at = literal.index(core)
    return _optional(literal[:at]) + re.escape(core) + _optional(literal[at + len(core) :])


def _optional(space: bytes) -> bytes:
    pattern = b""
    for k in reversed(range(len(space))):
        pattern = b"(?:" + re.escape(space[k : k + 1]) + pattern + b")?"
    return pattern
