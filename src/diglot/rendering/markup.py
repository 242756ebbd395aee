"""What one model's template writes around the parts of a reply, and those parts found again in what the model wrote.

What stands around a part is found by rendering sentinels in its place. Where a template has no way to write a part,
what the model's control tokens are for stands in (`[THINK]`, a channel), and where it has none of these the common way:
`<think>` for reasoning, Hermes' `<tool_call>` for calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from diglot.arrays import Ids
from diglot.errors import RenderingError
from diglot.rendering.reply import REASONING_FIELDS
from diglot.rendering.template import Template, without_empty_thinking, without_thinking
from diglot.rendering.types import Reply, Role, Shape
from diglot.vocabulary import Vocabulary

PROBE = {"role": "user", "content": "hi"}
_KEY, _VALUE = "SENTINELkey", "SENTINELvalue"
PLAIN: Shape = (Role.CONTENT,)
CALL: Shape = (Role.TOOL_CALL, Role.TOOL_CALL)
_MOST_CALLS = 64


@dataclass(frozen=True)
class Way:
    """How models write parts that their template need not know. A call is its name and its arguments.

    A model writes so if the markers that `reasoning`, or `call`, begins and ends with are control tokens of it.
    """

    reasoning: tuple[str, str] | None = None
    call: tuple[str, str, str] | None = None
    between: str = ""  # what begins the next part
    stop: str | None = None  # ends a turn of calls


COMMON = Way(("<think>\n", "\n</think>\n\n"), ('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>"))
WAYS = (
    Way(  # gpt-oss
        ("<|channel|>analysis<|message|>", ""),
        ("<|channel|>commentary to=functions.", " <|constrain|>json<|message|>", ""),
        between="<|end|><|start|>assistant",
        stop="<|call|>",
    ),
    Way(("[THINK]", "[/THINK]"), ("[TOOL_CALLS]", "[ARGS]", "")),  # Mistral, Magistral
    Way(("<|channel>thought\n", "<channel|>")),  # Gemma 4
    Way(("<|START_THINKING|>", "<|END_THINKING|>")),  # Command A
)
_MARKER = re.compile(r"<\|?\w+\|?>|\[/?[A-Z_]+\]")
MARKERS = frozenset(
    name
    for way in WAYS
    for part in (way.reasoning or (), way.call or (), (way.between,))
    for name in _MARKER.findall("".join(part))
)
"""The names of control tokens that stand around parts of a reply, of any model."""


@dataclass(frozen=True)
class Layout:
    """The text around the slots of a reply of one shape: one more piece than there are slots."""

    around: tuple[str, ...]  # what follows the generation prompt first; what precedes the stop last
    common: tuple[Role, ...] = ()  # parts in the common way: the template writes none, nor are control tokens for them
    bare: bool = False  # it follows the generation prompt without any think block
    stop: int | None = None  # the id that ends a reply of this shape

    @property
    def own(self) -> bool:
        """Does the model write all of it in this way?"""
        return not self.common

    def spelt(self, reply: Reply) -> str:
        """The reply of this shape as one text; control tokens of the markup by their names."""
        return self.around[0] + "".join(
            "".join(slot.texts) + after for slot, after in zip(reply.slots, self.around[1:], strict=True)
        )


def common_markup(shape: Shape) -> str:
    """How the common way spells a reply of this shape, "…" in the place of each slot."""
    return "…".join(_written(shape, COMMON))


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
        self._layouts: dict[Shape, tuple[Layout, ...]] = {}
        self._patterns: dict[tuple[Layout, bool], list[re.Pattern[bytes]]] = {}

    def layout(self, shape: Shape) -> Layout:
        """What stands around the slots of a reply, as it is written."""
        return self.layouts(shape)[0]

    def layouts(self, shape: Shape) -> tuple[Layout, ...]:
        """All that is recognised: the template's own first, then that of the model's control tokens."""
        if shape not in self._layouts:
            known = [self._own(shape), self._of_controls(shape)] if self.template.exists else []
            distinct = tuple(dict.fromkeys(layout for layout in known if layout is not None))
            self._layouts[shape] = distinct or (self._calls_behind(shape) or _commonly(shape),)
        return self._layouts[shape]

    def has_controls(self, shape: Shape) -> bool:
        """Does this model write control tokens between the parts of such a reply?"""
        return any(self.vocabulary.control[self._encode(text)].any() for text in self.layout(shape).around)

    @cached_property
    def controls(self) -> tuple[str, ...]:
        """The names of the control tokens that this model writes around the parts of a reply."""
        shapes = (PLAIN, (Role.REASONING, Role.CONTENT), CALL)
        ids = [i for shape in shapes for text in self.layout(shape).around for i in self._encode(text).tolist()]
        names = self.vocabulary.names
        return tuple(names[i] for i in dict.fromkeys(ids) if self.vocabulary.control[i] and i in names)

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
            for layout in self.layouts(shape):
                for whole in (True, False)[not finished :]:
                    patterns = self._pieces(layout, opened and shape[0] == Role.REASONING)
                    if slots := _slots(text, patterns, whole):
                        return shape, slots
        if opened:
            return (Role.REASONING,), [(0, len(text))]
        return PLAIN, [(0, len(text))]

    def _candidates(self, text: bytes, opened: bool) -> list[Shape]:
        """Shapes in the order in which to try them; none with reasoning where the text cannot hold it."""
        thinks = opened or text.lstrip().startswith(tuple(self._cores((Role.REASONING, Role.CONTENT), 0)))
        counts = range(min(self._count(text, (Role.TOOL_CALL,) * 2, 1), _MOST_CALLS), 0, -1)
        tails: list[Shape] = []
        for count in counts:
            calls = (Role.TOOL_CALL,) * (2 * count)
            tails += [calls, (Role.CONTENT, *calls)]
        tails.append(PLAIN)
        if not thinks:
            return tails
        return [(Role.REASONING, *tail) for tail in tails] + [(Role.REASONING,), *([] if opened else tails)]

    def _cores(self, shape: Shape, at: int) -> list[bytes]:
        cores = [self._marks(layout.around[at]).strip() for layout in self.layouts(shape)]
        return [core for core in cores if core]

    def _count(self, text: bytes, shape: Shape, at: int) -> int:
        return max((text.count(core) for core in self._cores(shape, at)), default=0)

    def _marks(self, literal: str) -> bytes:
        return self.marked(self._encode(literal))[0] if literal else b""

    def _pieces(self, layout: Layout, opened: bool) -> list[re.Pattern[bytes]]:
        """What stands around the slots of a layout, at its end the text's. Whitespace at the edges may be missing."""
        key = (layout, opened)
        if key not in self._patterns:
            around = [self._marks(text) for text in layout.around]
            if opened:
                around[0] = b""
            first = self._opening(layout.around[0], around[0])
            between, last = map(_flexible, around[1:-1]), _flexible(around[-1]) + b"\\Z"
            self._patterns[key] = [re.compile(one) for one in (first, *between, last)]
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
                return self._closed(layout, shape)
        return None

    def _closed(self, layout: Layout, shape: Shape) -> Layout:
        """A layout with what closes its calls where the template writes that behind several of them only.

        DeepSeek's template leaves out the end of all calls, and the stop, behind a single one.
        """
        if layout.stop in self._stops or shape[-1] != Role.TOOL_CALL or len(shape) > 2 * len(CALL):
            return layout
        longer = self._own((*shape, *CALL))
        if longer is None or longer.stop not in self._stops:
            return layout
        return replace(layout, around=(*layout.around[:-1], longer.around[-1]), stop=longer.stop)

    def _calls_behind(self, shape: Shape) -> Layout | None:
        """Calls in the model's own markup behind what its template writes no calls behind, as DeepSeek's and older ones
        of Mistral; None if they do not begin with a token of their own, which says that they are calls wherever it is.
        """
        first = shape.index(Role.TOOL_CALL) if Role.TOOL_CALL in shape else 0
        if not first or not self.template.exists:
            return None
        head, calls = self.layout(shape[:first]), self.layout(shape[first:])
        opening = without_empty_thinking(calls.around[0])
        ids = self._encode(opening)
        if not calls.own or not len(ids) or ids[0] not in self.template.tokenizer.added_tokens_decoder:
            return None
        between = (head.around[-1] if shape[first - 1] == Role.REASONING else "") + opening
        return replace(head, around=(*head.around[:-1], between, *calls.around[1:]), stop=calls.stop)

    def _of_controls(self, shape: Shape) -> Layout | None:
        """As the model's control tokens say; None if they say it of no way to write all these parts, or of several."""
        prompt, plain = self._try([PROBE], generation_prompt=True), self._own(PLAIN)
        ways = [way for way in WAYS if self._has(way, shape)]
        if prompt is None or plain is None or len(ways) != 1:
            return None
        around = _written(shape, ways[0], without_empty_thinking(plain.around[0]), plain.around[-1])
        ends = {name: i for i, name in self.vocabulary.names.items()}
        stop = ends.get(ways[0].stop or "") if Role.TOOL_CALL in shape else None
        return Layout(around, bare=without_thinking(prompt) != prompt, stop=plain.stop if stop is None else stop)

    def _has(self, way: Way, shape: Shape) -> bool:
        """Are the markers of a way's parts control tokens of this model?"""
        needed = {Role.REASONING: way.reasoning, Role.TOOL_CALL: way.call}
        parts = [needed[role] for role in set(shape) & needed.keys()]
        names = set(self.vocabulary.names.values())
        return bool(parts) and all(
            part is not None and names.issuperset(_MARKER.findall("".join(part) + way.between)) for part in parts
        )

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
                before, separator, rest = rest.partition(mark)
                if not separator:
                    return None
                around.append(before)
            closing, stop = self._closing(rest, calls=len(marks) > 1)
            return Layout((*around, closing), bare=start != prompt, stop=stop)
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


def _commonly(shape: Shape) -> Layout:
    return Layout(_written(shape, COMMON), common=tuple(dict.fromkeys(role for role in shape if role != Role.CONTENT)))


def _written(shape: Shape, way: Way, opening: str = "", closing: str = "") -> tuple[str, ...]:
    """What stands around the parts of a reply.

    Args:
        opening, closing: what stands around content.
    """
    assert COMMON.reasoning is not None and COMMON.call is not None
    reasoning, call = way.reasoning or COMMON.reasoning, way.call or COMMON.call
    around, after = [], ""
    for k, role in enumerate(shape):
        if role == Role.REASONING:
            around.append(after + reasoning[0])
            after = reasoning[1]
        elif role == Role.CONTENT:
            around.append(after + (way.between if k else "") + opening)
            after = closing if k == len(shape) - 1 else ""
        elif _calls_before(shape, k) % 2 == 0:
            between = way.between if way is not COMMON else "" if shape[k - 1] == Role.REASONING else "\n"
            around.append(after + (between if k else "") + call[0])
            after = ""
        else:
            around.append(call[1])
            after = call[2]
    return (*around, after.rstrip() if shape[-1] == Role.REASONING else after)


def _slots(text: bytes, pieces: Sequence[re.Pattern[bytes]], whole: bool) -> list[tuple[int, int]] | None:
    """The spans between pieces, each of which is taken where it first occurs: a search that never turns back.

    Args:
        whole: is the last piece there, at the end of the text? If not, it is still to come.
    """
    opening = pieces[0].match(text)
    if opening is None:
        return None
    spans, at = [], opening.end()
    for piece in pieces[1:-1]:
        if (following := piece.search(text, at)) is None:
            return None
        spans.append((at, following.start()))
        at = following.end()
    if not whole:
        return [*spans, (at, len(text))]
    closing = pieces[-1].search(text, at)
    return None if closing is None else [*spans, (at, closing.start())]


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
