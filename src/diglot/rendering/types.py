"""A conversation before it is rendered, and one side's rendering of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from diglot.arrays import Bools, Ints

Score = Literal["last", "all"]
"""Which assistant turns of a conversation are segments."""


class Role(IntEnum):
    """What a token of a rendered conversation is."""

    PROMPT = 0  # everything that is read before the reply
    CONTENT = 1
    REASONING = 2  # content inside a think block
    TOOL_CALL = 3  # content inside a tool call
    MARKUP = 4  # written by nobody (template), or a control token in the middle of a reply
    STOP = 5  # ends a reply


Shape = tuple[Role, ...]


@dataclass(frozen=True)
class Slot:
    """One part of a reply. A call of a tool is two: its name, and its arguments as JSON."""

    role: Role  # CONTENT, REASONING or TOOL_CALL
    texts: tuple[str, ...]  # what was written between control tokens that stand in no markup known here
    edges: tuple[str, ...] = ()  # the names of those control tokens, one fewer than texts


@dataclass(frozen=True)
class Reply:
    """The parts of a reply, in the order that templates write them.

    `whole` is the reply as it was written, where that is text with no control token in it.
    """

    slots: tuple[Slot, ...]
    whole: str | None = None
    others: tuple[str, ...] = ()  # fields of the message that are none of the parts

    @cached_property
    def shape(self) -> Shape:
        """The role of each slot."""
        return tuple(slot.role for slot in self.slots)

    @property
    def is_plain(self) -> bool:
        """Is it content and nothing else?"""
        return self.shape == (Role.CONTENT,) and not self.slots[0].edges

    @property
    def text(self) -> str:
        """All of its texts, one after the other."""
        return "".join(text for slot in self.slots for text in slot.texts)


@dataclass(frozen=True)
class Conversation:
    """What is read before the last reply: messages, or plain text when `messages` is None."""

    messages: tuple[dict[str, Any], ...] | None
    text: str = ""
    tools: tuple[dict[str, Any], ...] | None = None
    teacher_view: Conversation | None = None  # what the teacher reads in its place, if that is something else
    route: str | None = None  # the one teacher that is to read it, where there are several


@dataclass(frozen=True)
class Rendered:
    """One sample as one side reads it. Arrays are per token, [n]."""

    ids: Ints
    roles: NDArray[np.int8]
    segment: NDArray[np.int32]  # segment of this sample, -1: never scored
    end: Ints  # byte end inside the segment, length + 1 for a stop token; 0 where segment is -1
    exact: Bools
    segment_bytes: tuple[bytes, ...]  # [S] text of each segment
    stopped: tuple[bool, ...]  # [S] does it end with a stop token?
    reply: Reply | None = None  # what was read in the last turn, part by part
    own_markup: int = 0  # tokens that it wrote between the parts, as its template does, or behind a broken character

    @property
    def scored(self) -> Ints:
        """The places of the scored tokens."""
        return np.flatnonzero(self.segment >= 0)

    @property
    def ended(self) -> bool:
        """Did the last reply end by itself, rather than at a limit of length? Its stop need not be scored."""
        return self.stopped[-1] or bool(self.roles[-1] == Role.STOP)

    @property
    def prompt_length(self) -> int:
        """Tokens before the last reply."""
        return int(np.flatnonzero(self.roles == Role.PROMPT)[-1]) + 1
