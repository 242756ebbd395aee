"""Rows as other programs write them, as rows with Diglot's own columns. Pure functions of one row."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diglot.errors import ConfigError, DataError

Row = Mapping[str, Any]

OWN = ("prompt", "completion", "messages", "text", "tools", "teacher_prompt", "teacher")
# What a conversation is put together from, where a file has its parts in columns of their own.
PARTS = ("system", "history", "user", "reasoning", "assistant")
MEDIA = ("images", "image", "videos", "video", "audio", "audios")
CONVERSATIONS = ("conversations", "conversation", "messages", "dialog", "dialogue")

LABELS = ("label", "kto_tag")  # whether the answer is one to write, as in the data of KTO
UNWEIGHED = ("loss", "train")  # what ms-swift and Axolotl call the weight of a message: true or false
BAD = "__bad__"  # why a row could not be converted: it is refused when its turn comes, so that it can be skipped

WRITTEN = "__written__"  # is what is None in a row so in its file, where a table has no other way to leave out a field?

SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    "system": "system",
    "developer": "developer",
}


_CALLERS = ("function_call", "tool_call")  # whose value is a call as JSON text


def column_mapping(value: str | Mapping[str, str] | None) -> dict[str, str] | None:
    """New name -> name in the data, from a mapping or from text as in "user=question,assistant=answer".

    A name alone stands for itself. None stays None.

    Raises:
        ConfigError: a name that nothing reads, or that stands twice; a value that is no name.
    """
    if value is None:
        return None
    if isinstance(value, str):
        parts = [part.strip().partition("=") for part in value.split(",") if part.strip()]
        pairs: list[tuple[Any, Any]] = [(new.strip(), (old if equals else new).strip()) for new, equals, old in parts]
    else:
        pairs = list(value.items())
    names = [new for new, _ in pairs]
    if not pairs or len(set(names)) < len(names) or not all(isinstance(old, str) and old for _, old in pairs):
        raise ConfigError(
            f"dataset_columns={value!r} cannot work: it must be NAME=COLUMN with commas between, each name once, or a "
            "mapping of them."
        )
    return dict(pairs)


def check_mapping(mapping: Mapping[str, str], name: str | None, columns: Sequence[str] | None, where: str) -> None:
    """Raise for names in a mapping that nothing reads (`ConfigError`) or columns that are not there (`DataError`)."""
    known = (*OWN, *PARTS, *(READS[name] if name else ()))
    if wrong := [new for new in mapping if new not in known]:
        raise ConfigError(f"dataset_columns names {', '.join(wrong)}, which nothing reads; known: {', '.join(known)}.")
    if columns is not None and (absent := [old for old in mapping.values() if old not in columns]):
        raise DataError(
            f"{where} has no column {', '.join(absent)}, which dataset_columns names; it has "
            f"{', '.join(sorted(columns))}."
        )


def convert(row: Row, name: str | None, mapping: Mapping[str, str] | None) -> dict[str, Any]:
    """A row with all of Diglot's own columns, None where it has nothing for one, and `__bad__`.

    Args:
        name: of a format, a key of `FORMATS`.
        mapping: new name -> name in the data. Without a format, what it does not name is not read.
    """
    renamed = {new: row.get(old) for new, old in (mapping or {}).items()}
    own: dict[str, Any] = {**row, **renamed} if name or mapping is None else renamed
    bad = None
    try:
        if name and (media := [column for column in MEDIA if row.get(column)]):
            raise DataError(
                f"there is something in `{media[0]}`, and only text can be compared. Take such rows out, or the column."
            )
        own = FORMATS[name](own) if name else own
        own = _with_parts({**own, "reasoning": renamed.get("reasoning")})  # else it may be a switch: "on", "off"
        labels = {label: row.get(label) for label in LABELS if label not in (mapping or {}).values()}
        if unwanted := not_to_be_written({**own, **labels}):
            raise DataError(unwanted)
    except DataError as error:
        own, bad = {}, str(error)
    return {**{column: own.get(column) for column in OWN}, BAD: bad}


def not_to_be_written(row: Row) -> str | None:
    """Why the answer in a row must not be imitated; None if nothing says so. Fields of a table are text."""
    name = next((one for one in LABELS if str(row.get(one)).lower() == "false"), None)  # 0 may be the name of a class
    if name is None or not is_answered(row):
        return None
    return (
        f"`{name}` is {row[name]!r}, as in KTO's data of an answer not to write, and it would be imitated. Leave such "
        "rows out, or name the columns to read without the answer: dataset_columns."
    )


def is_answered(row: Row) -> bool:
    """Has a row with Diglot's own columns an answer in it?"""
    messages = row.get("messages")
    last = messages[-1] if isinstance(messages, Sequence) and messages else None
    return row.get("completion") is not None or (isinstance(last, Mapping) and last.get("role") == "assistant")


# ---- parts of a conversation -------------------------------------------------------------------------------------


def _with_parts(row: Row) -> dict[str, Any]:
    """`user`, `reasoning`, `assistant`, `history` and `system` as messages."""
    own = {name: value for name, value in row.items() if name not in PARTS}
    if row.get("user") is not None:
        question = [*_history(row.get("history")), {"role": "user", "content": _text(row["user"], "user")}]
        answer = row.get("assistant")
        reply = [] if answer is None else [{"role": "assistant", "content": _text(answer, "assistant")}]
        own["messages"] = [*question, *reply]
    elif row.get("assistant") is not None:
        raise DataError("the column that is read as `user` holds nothing, and `assistant` something.")
    return _with_system(_with_reasoning(own, row.get("reasoning")), row.get("system"))


def _with_reasoning(row: dict[str, Any], reasoning: Any) -> dict[str, Any]:
    """What was thought before the last answer, as a field of its message."""
    if not reasoning:
        return row
    name = "messages" if row.get("messages") is not None else "completion"
    messages: Any = row.get(name)
    if isinstance(messages, str) and not isinstance(row.get("prompt"), str):
        messages = [{"role": "assistant", "content": messages}]
    last = messages[-1] if isinstance(messages, Sequence) and messages and not isinstance(messages, str) else None
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        raise DataError(
            "there is reasoning, and no message of the assistant's to put it into. Map the answer as `assistant`: "
            "dataset_columns user=...,reasoning=...,assistant=..."
        )
    return {**row, name: [*messages[:-1], {**last, "reasoning_content": _text(reasoning, "reasoning")}]}


def _with_system(row: dict[str, Any], system: Any) -> dict[str, Any]:
    """The system text as the first message of the conversation."""
    if not system:
        return row
    name = "messages" if row.get("messages") is not None else "prompt"
    messages = row.get(name)
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise DataError(
            "there is a system text and no conversation to put it before: `prompt` is plain text. Map it as `user`: "
            "dataset_columns user=prompt,assistant=completion,system=..."
        )
    if messages and isinstance(messages[0], Mapping) and messages[0].get("role") == "system":
        raise DataError("there is a system text beside a conversation that begins with a system message.")
    return {**row, name: [{"role": "system", "content": _text(system, "system")}, *messages]}


def _history(turns: Any) -> list[dict[str, str]]:
    """Earlier turns as pairs of a question and an answer."""
    messages = []
    for turn in turns or ():
        if not isinstance(turn, Sequence) or len(turn) != 2:
            raise DataError(f"`history` holds {turn!r:.60}, expected pairs of a question and an answer.")
        for role, text in zip(("user", "assistant"), turn, strict=True):
            messages.append({"role": role, "content": _text(text, "history")})
    return messages


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"`{name}` is {value!r:.60}, expected a string.")
    return value


def _parsed(value: Any, name: str) -> Any:
    """Messages, also where they are written as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        messages = json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(f"`{name}` is text but not JSON: {error}.") from error
    if not isinstance(messages, list):
        raise DataError(f"`{name}` is JSON text of {messages!r:.60}, expected a list of messages.")
    return messages


# ---- formats -----------------------------------------------------------------------------------------------------


def _sharegpt(row: Row) -> dict[str, Any]:
    """Turns with `from` and `value`, a system text beside them."""
    name = next((one for one in CONVERSATIONS if row.get(one) is not None), None)
    if name is None:
        raise DataError(f"there is no conversation in it; expected a column {' or '.join(CONVERSATIONS)}.")
    turns = _parsed(row[name], name)
    if not isinstance(turns, Sequence) or not turns:
        raise DataError(f"`{name}` is {turns!r:.60}, expected a list of turns with `from` and `value`.")
    return {**_shared(row), "messages": [_turn(turn, name) for turn in turns]}


def _turn(turn: Any, name: str) -> dict[str, Any]:
    if isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and turn.get("from") is None:
        return dict(turn)
    speaker = turn.get("from") if isinstance(turn, Mapping) else None
    if speaker not in SPEAKERS:
        raise DataError(
            f"`{name}` holds {turn!r:.80}, expected {{'from': ..., 'value': ...}} with one of {', '.join(SPEAKERS)}."
        )
    text = _text(turn.get("value"), "value")
    says = {"content": None, "tool_calls": _calls(text, speaker)} if speaker in _CALLERS else {"content": text}
    message = {"role": SPEAKERS[speaker], **says}
    return message | {one: turn[one] for one in ("weight", *UNWEIGHED) if turn.get(one) is not None}


def _calls(text: str, speaker: str) -> list[dict[str, Any]]:
    """Calls of tools that are JSON text: one, or a list of them."""
    try:
        calls = json.loads(text)
    except json.JSONDecodeError:
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise DataError(
            f"a turn of {speaker!r} is {text!r:.80}, expected JSON text of {{'name': ..., 'arguments': ...}}, or of a "
            "list of such."
        )
    return [{"type": "function", "function": call} for call in calls]


def _alpaca(row: Row) -> dict[str, Any]:
    """`instruction`, `input` below it if there is one, `output`."""
    parts = [_text(row.get("instruction"), "instruction")]
    if row.get("input"):
        parts.append(_text(row["input"], "input"))
    return {
        **_shared(row),
        "user": "\n\n".join(part for part in parts if part),
        "assistant": row.get("output"),
        "history": row.get("history"),
    }


def _preference(row: Row) -> dict[str, Any]:
    """What was chosen of two answers; the other one is not read."""
    chosen, prompt = row.get("chosen"), row.get("prompt")
    if not chosen:
        raise DataError(f"`chosen` is {chosen!r}, expected an answer or a conversation.")
    if isinstance(chosen, str):
        if prompt is None:
            raise DataError("`chosen` is text and there is no `prompt`. Map it as plain text: dataset_columns text=...")
        return {**_shared(row), "prompt": prompt, "completion": chosen}
    turns = [chosen] if isinstance(chosen, Mapping) else chosen
    if not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError(f"`chosen` is {chosen!r:.80}, expected one answer or a conversation.")
    answer = [_turn(turn, "chosen") for turn in turns]
    if answer[0].get("role") != "assistant":  # the whole conversation
        return {**_shared(row), "messages": answer}
    if prompt is None:
        return {**_shared(row), "messages": [*_sharegpt(row)["messages"], *answer]}
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return {**_shared(row), "prompt": before, "completion": answer}


def _json_text(row: Row) -> dict[str, Any]:
    """Own columns, of which those that hold messages are written as JSON text."""
    names = ("messages", "prompt", "completion", "teacher_prompt")
    return {**row, **{name: _parsed(row[name], name) for name in names if row.get(name) is not None}}


def _shared(row: Row) -> dict[str, Any]:
    return {name: row.get(name) for name in SHARED}


FORMATS: dict[str, Callable[[Row], dict[str, Any]]] = {
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "preference": _preference,
    "json_text": _json_text,
}
SHARED = ("tools", "teacher_prompt", "teacher", "system")  # what every format reads
READS: dict[str, tuple[str, ...]] = {
    "sharegpt": CONVERSATIONS,
    "alpaca": ("instruction", "input", "output", "history"),
    "preference": ("chosen", "rejected", "prompt", *CONVERSATIONS),
    "json_text": OWN,
}
"""Which columns a format reads beside Diglot's own: names that `dataset_columns` may give."""
