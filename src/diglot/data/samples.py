"""One row of a dataset as a sample: what is read, and what was answered, if anything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from diglot.data.formats import BAD, MEDIA, SPEAKERS, UNWEIGHED, WRITTEN, not_to_be_written
from diglot.data.recognise import EXPECTED
from diglot.errors import DataError, DiglotError
from diglot.rendering import Conversation, Reply, message_reply
from diglot.rendering.reply import REASONING_FIELDS, call_parts
from diglot.rendering.template import content_text

LONGEST = 1 << 24  # characters of a row
LEAVE_OUT = "Mend it, or have training leave such rows out: on_bad_row: skip."
_SAYS = ("tool_calls", "function_call", "audio", *REASONING_FIELDS)  # what a message may say without content


@dataclass(frozen=True)
class Sample:
    """A conversation and the reply to it, None where the data hold a prompt only. `where` names the row in messages."""

    conversation: Conversation
    reply: str | None  # its text
    where: str
    answer: Reply | None = None  # its parts, where it is more than a text


def to_sample(row: Mapping[str, Any], where: str) -> Sample:
    """A row with columns `prompt`, `prompt` + `completion`, `messages` or `text`, as strings or lists of messages.

    `teacher_prompt`, a string or a list of messages, is what the teacher reads before the same reply; `teacher` names
    the one of several teachers that reads it.

    Raises:
        DataError: none of these columns, or a value of the wrong kind; the message names the row.
    """
    sample = _own_columns(row, where)
    if unwanted := not_to_be_written(row):
        raise DataError(f"{where}: {unwanted}")
    view, route = _teacher_view(row, sample.conversation.tools, where), row.get("teacher")
    if view is None and route is None:
        return sample
    conversation = replace(sample.conversation, teacher_view=view, route=None if route is None else str(route))
    return replace(sample, conversation=conversation)


def to_sample_or_stop(row: Mapping[str, Any], where: str) -> Sample:
    """`to_sample` where a bad row is the end: its error says how such rows are left out."""
    try:
        return to_sample(row, where)
    except DiglotError as error:
        raise DataError(f"{error} {LEAVE_OUT}") from error


def _own_columns(row: Mapping[str, Any], where: str) -> Sample:
    """What the student reads."""
    if row.get(BAD):
        raise DataError(f"{where}: {row[BAD]}")
    if media := [name for name in MEDIA if row.get(name)]:
        raise DataError(
            f"{where} has something in `{media[0]}`: only text can be compared. dataset_columns, which names the "
            "columns to read, has their text read alone."
        )
    _check_size(row, where)
    _check_unicode(row, where)
    tools = _tools(row.get("tools"), bool(row.get(WRITTEN)), where)
    if row.get("messages") is not None:
        return _from_messages(_messages(row, "messages", where), tools, where)
    if row.get("prompt") is not None:
        return _from_prompt(row, tools, where)
    if row.get("text") is not None:
        return Sample(Conversation(None), _string(row["text"], "text", where), where)
    raise DataError(f"{where} has nothing in its columns {_names(row)}, expected {EXPECTED}.")


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(sorted(name for name in row if not name.startswith("__")))


def _teacher_view(row: Mapping[str, Any], tools: Any, where: str) -> Conversation | None:
    """What the teacher alone reads."""
    prompt = row.get("teacher_prompt")
    if prompt is None:
        return None
    if isinstance(prompt, str):
        return Conversation(None, prompt)
    return _conversation(_messages(row, "teacher_prompt", where), tools, where)


def _conversation(messages: tuple[dict[str, Any], ...], tools: Any, where: str) -> Conversation:
    """Messages and the tools that are offered, also those that stand in a system message, as GLM-4's data have them."""
    for message in messages:
        if (offered := _tools(message.get("tools"), True, where)) is None:
            continue
        if message["role"] not in ("system", "developer"):
            raise DataError(
                f"{where}: a message of the role {message['role']!r} has `tools`, which no template reads there. Put "
                "them into the column `tools`."
            )
        if tools is not None and offered != tools:
            raise DataError(
                f"{where}: a {message['role']} message offers other `tools` than the column, or than one before it "
                f"({_tool_names(offered)}; {_tool_names(tools)}). Keep one list, in the column `tools`."
            )
        tools = offered
    bare = ({name: value for name, value in message.items() if name != "tools"} for message in messages)
    return Conversation(tuple(bare), tools=tools)


def _tool_names(tools: Sequence[Mapping[str, Any]]) -> str:
    functions = [tool.get("function", tool) for tool in tools]
    return ", ".join(str(one.get("name") if isinstance(one, Mapping) else one) for one in functions)


def _check_size(row: Mapping[str, Any], where: str) -> None:
    """A row must not fill the memory: templates and tokenizers take many times its length."""
    size = sum(
        _letters(row.get(name)) for name in ("prompt", "completion", "messages", "text", "tools", "teacher_prompt")
    )
    if size > LONGEST:
        raise DataError(f"{where} holds {size} characters, expected at most {LONGEST}.")


def _check_unicode(row: Mapping[str, Any], where: str) -> None:
    """Half of a surrogate pair has no bytes in UTF-8: JSON can spell it, no tokenizer can read it."""
    for name in ("prompt", "completion", "messages", "text", "tools", "teacher_prompt"):
        if (half := lone_surrogate(row.get(name))) is not None:
            raise DataError(
                f"{where} holds the lone surrogate U+{ord(half):04X} in `{name}`, expected Unicode text: it was "
                "probably cut in the middle of an emoji."
            )


def lone_surrogate(value: Any) -> str | None:
    """The first lone surrogate in a value's texts, keys included."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            return value[error.start]
        return None
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return next((half for item in value if (half := lone_surrogate(item)) is not None), None)
    return None


def _letters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_letters(one) for one in value.values())
    return sum(_letters(one) for one in value) if isinstance(value, (list, tuple)) else 0


def _from_messages(messages: tuple[dict[str, Any], ...], tools: Any, where: str) -> Sample:
    if messages[-1]["role"] != "assistant":
        return Sample(_conversation(messages, tools, where), None, where)
    if len(messages) == 1:
        raise DataError(
            f"{where}: the only message is the assistant's, so there is no prompt. Put what it answers before it."
        )
    if messages[-1].get("weight") == 0:
        raise DataError(
            f"{where}: the last message has weight 0 (or `loss`, `train` false), so there is nothing to learn from. "
            "Take it off: the row is then a prompt, which the student answers."
        )
    reply = message_reply(messages[-1], where)
    text = content_text(messages[-1], where)
    answer = None if reply.is_plain and not reply.others else reply
    return Sample(_conversation(messages[:-1], tools, where), text, where, answer)


def _from_prompt(row: Mapping[str, Any], tools: Any, where: str) -> Sample:
    prompt, completion = row["prompt"], row.get("completion")
    if isinstance(prompt, str):
        if not prompt:
            raise DataError(f"{where}: `prompt` is empty. For text without a prompt use the column `text`.")
        reply = None if completion is None else _string(completion, "completion", where)
        return Sample(Conversation(None, prompt), reply, where)
    messages = _messages(row, "prompt", where)
    if completion is None or isinstance(completion, str):
        return Sample(_conversation(messages, tools, where), completion, where)
    answer = _messages(row, "completion", where)
    if answer[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: the last message of `completion` is from {answer[-1]['role']!r}, expected 'assistant'."
        )
    return _from_messages(messages + answer, tools, where)


def _messages(row: Mapping[str, Any], column: str, where: str) -> tuple[dict[str, Any], ...]:
    value = row[column]
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not value:
        raise DataError(f"{where}: `{column}` is {value!r:.80}, expected a string or a non-empty list of messages.")
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(
                f"{where}: `{column}` holds {message!r:.80}, expected {{'role': ..., 'content': ...}}.{_of_ids(value)}"
            )
        _check_role(message["role"], column, where)
        if message.get("content") is None and not any(message.get(name) for name in _SAYS):
            raise DataError(f"{where}: `{column}` holds {message!r:.80}, which has neither content nor a call.")
        if message.get("weight") not in (None, 0, 1):
            raise DataError(f"{where}: `{column}` has a message of weight {message['weight']!r:.40}, expected 0 or 1.")
        content_text(message, where)
        for call in message.get("tool_calls") or ():
            call_parts(call, where)
    as_written = row.get(WRITTEN)
    if as_written is None:  # nobody says where the row is from: all messages of a table have the same fields
        as_written = len({frozenset(message) for message in value}) > 1
    return tuple(_weighed(_without_none(message, as_written)) for message in value)


def _weighed(message: dict[str, Any]) -> dict[str, Any]:
    """`loss` and `train`, other words for whether a message is to be learned, as its weight."""
    flags = [message[name] for name in UNWEIGHED if isinstance(message.get(name), bool)]
    rest = {name: value for name, value in message.items() if not (name in UNWEIGHED and isinstance(value, bool))}
    return rest if all(flags) else {**rest, "weight": 0}


def _check_role(role: str, column: str, where: str) -> None:
    """A role in other words would be read as one of the template's own, and an assistant's turn as a user's."""
    meant = SPEAKERS.get(role.lower())
    if meant in ("user", "assistant", "system") and role != meant:
        raise DataError(f"{where}: `{column}` has a message of the role {role!r}, expected {meant!r}.")


def collate_samples(rows: list[dict[str, Any]]) -> dict[str, list[Sample]]:
    """Rows of a dataset as samples; runs in the data workers."""
    return {"samples": [to_sample_or_stop(row, f"row {row.get('__row__', i)}") for i, row in enumerate(rows)]}


def _tools(value: Any, written: bool, where: str) -> tuple[dict[str, Any], ...] | None:
    """JSON schemas, as a list or, since their shapes differ from row to row, as a string of JSON.

    Args:
        written: is what is None in them so in the file?
    """
    if isinstance(value, str):
        written = True
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: `tools` is a string but not JSON: {error}.") from error
    if not value:
        return None
    if not isinstance(value, Sequence) or not all(isinstance(tool, Mapping) for tool in value):
        raise DataError(f"{where}: `tools` is {value!r:.80}, expected a list of JSON schemas.")
    return tuple(value) if written else tuple(_without_none(tool) for tool in value)


def _without_none(value: Any, as_written: bool = False) -> Any:
    """A table of rows with unlike fields fills those that a row lacks with None, at every depth.

    The content of a message that calls tools stays None: templates tell by it that there is nothing but the call.

    Args:
        as_written: is it of no table? Then a call's arguments that are None are meant so.
    """
    if isinstance(value, Mapping):
        fields = {
            k: v if as_written and k in ("arguments", "tools") else _without_none(v, as_written)
            for k, v in value.items()
            if v is not None
        }
        if "role" in fields and fields.get("tool_calls"):
            return {"role": value["role"], "content": None, **fields}
        return fields
    return [_without_none(v, as_written) for v in value] if isinstance(value, list) else value


def _of_ids(value: Any) -> str:
    """What to do about token ids in the place of a text."""
    if isinstance(value, Sequence) and value and not isinstance(value, str) and isinstance(value[0], int):
        return " Token ids belong to one tokenizer, and two models read these rows: give their text."
    return ""


def _string(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: `{column}` is {value!r:.60}, expected a string.{_of_ids(value)}")
    return value
