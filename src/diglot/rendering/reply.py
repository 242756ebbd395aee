"""A reply as what its writer meant: reasoning, content and calls of tools, without the markup of any one model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from diglot.errors import DataError
from diglot.rendering.template import content_text
from diglot.rendering.types import Reply, Role, Slot

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""What messages call the reasoning of a turn; templates read one of them."""

_REFUSED = {
    "function_call": "cannot be scored. Use `tool_calls`",
    "audio": "cannot be scored. Leave the row out",
    "refusal": "no template writes. Put its text into `content`, or leave the row out",
    "prefix": "says that it is unfinished, and its end would be learned. Leave the row out, or finish it",
    "partial": "says that it is unfinished, and its end would be learned. Leave the row out, or finish it",
}
_ARGUMENTS = "Expected an object, or JSON text of one, from the names of the parameters to their values."
_KNOWN = ("role", "content", "tool_calls", "weight", *REASONING_FIELDS)


def plain_reply(text: str) -> Reply:
    """Content and nothing else."""
    return Reply((Slot(Role.CONTENT, (text,)),), text)


_OPENS = re.compile(r"\A\s*<think>\n?(.*?)\n?</think>\n{0,2}(.*)\Z", re.S)
_INSIDE = re.compile(r"\A(.*?)\n?</think>\n{0,2}(.*)\Z", re.S)


def text_reply(text: str, *, opened: bool = False) -> Reply:
    """A reply given as text: its reasoning apart, if it starts with a think block or inside one (`opened`)."""
    match = (_INSIDE if opened and "<think>" not in text else _OPENS).match(text) if "</think>" in text else None
    if match is None or not match[1].strip():
        return plain_reply(text)
    return Reply((Slot(Role.REASONING, (match[1],)), Slot(Role.CONTENT, (match[2],))), text)


def message_reply(message: Mapping[str, Any], where: str) -> Reply:
    """The parts of an assistant's message: `content`, `tool_calls`, and its reasoning by any of its names.

    Raises:
        DataError: a field that holds a part of the reply in a form that cannot be read; the message names the row.
    """
    slots = []
    reasoning = [message[name] for name in REASONING_FIELDS if message.get(name)]
    if wrong := [value for value in reasoning if not isinstance(value, str)]:
        raise DataError(f"{where}: the reasoning of the last message is {wrong[0]!r:.60}, expected a string.")
    if len(set(reasoning)) > 1:
        raise DataError(f"{where}: the last message has several texts of reasoning. Keep one of {REASONING_FIELDS}.")
    if reasoning:
        slots.append(Slot(Role.REASONING, (reasoning[0],)))
    calls = [call_parts(call, where) for call in message.get("tool_calls") or ()]
    content = content_text(message, where)
    if content or not calls:
        slots.append(Slot(Role.CONTENT, (content,)))
    slots += [Slot(Role.TOOL_CALL, (text,)) for call in calls for text in call]
    for name, why in _REFUSED.items():
        if message.get(name):
            raise DataError(f"{where}: the last message has {name!r}, which {why}.")
    others = tuple(name for name, value in message.items() if name not in _KNOWN and value)
    whole = content if [slot.role for slot in slots] == [Role.CONTENT] else None
    return Reply(tuple(slots), whole, others)


def call_parts(call: Any, where: str) -> tuple[str, str]:
    """Name and arguments of a call, the latter as they are written if they are text.

    Raises:
        DataError: it has no name, or its arguments are no object; the message names the row.
    """
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise DataError(
            f"{where}: a message calls {call!r:.80}, expected {{'function': {{'name': ..., 'arguments': ...}}}}."
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        written = arguments or "{}"
        try:
            arguments = json.loads(written)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: the arguments of a call of {name!r} are {written!r:.80}, which is text but not JSON: "
                f"{error}. {_ARGUMENTS}"
            ) from error
    else:
        arguments = {} if arguments is None else arguments
        written = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, Mapping):
        raise DataError(f"{where}: the arguments of a call of {name!r} are {written!r:.80}. {_ARGUMENTS}")
    return name, written
