"""A conversation as text in one model's own chat template, cut where replies stand.

What is only read is rendered as at inference: a template may strip the reasoning of earlier turns, trim or wrap.
Where scored content lands is found by rendering with sentinels in its place, never by searching for the content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import get_json_schema

from diglot.errors import RenderingError
from diglot.rendering.template_process import templates

_PROBE = "SENTINELtext"
_THINK_OPENED = re.compile(r"<think>\s*\Z")
_WORD = re.compile(r"\w+")
_THINK_EMPTY_FIRST = re.compile(r"\A\s*<think>\s*</think>\s*")
_THINK_EMPTY = re.compile(r"<think>\s*</think>\s*\Z")


def content_text(message: Mapping[str, Any], where: str) -> str:
    """The text of a message: a string, or parts that are all text."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    other: Any = content
    if isinstance(content, (list, tuple)):
        other = next((part for part in content if not _is_text(part)), None)
        if other is None:
            return "".join(part["text"] for part in content)
    raise RenderingError(
        f"{where}: the content of a {message.get('role')!r} message is {type(content).__name__}, expected a string or "
        f"a list of text parts {{'type': 'text', 'text': ...}}, not {other!r:.60}. Only text can be compared."
    )


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


class Template:
    """One model's way to write a conversation as text.

    Args:
        name: of the model, for messages: "student", "teacher".
        kwargs: handed to the template.
        fold_system: put a system message that the template refuses or drops into the first user's.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        kwargs: Mapping[str, Any] | None,
        name: str,
        *,
        fold_system: bool = False,
    ) -> None:
        self.tokenizer, self.kwargs, self.name = tokenizer, dict(kwargs or {}), name
        self.fold_system = fold_system
        self.exists = bool(getattr(tokenizer, "chat_template", None))

    def text(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        generation_prompt: bool = False,
    ) -> str:
        """`messages` as text. Raises `RenderingError` with the template's own complaint."""
        plain = [self._joined(m) for m in messages]
        if not self.exists:
            return _transcript(plain, tools, generation_prompt)
        if self.fold_system and plain and plain[0].get("role") == "system" and self._refuses_system:
            plain = _folded(plain)
        if self._wants_parts:
            plain = [_in_parts(m) for m in plain]
        offered = list(tools) if tools else None
        try:
            return self._rendered(plain, offered, generation_prompt)
        except Exception as error:  # jinja's errors, and whatever a template raises
            if any(m.get("content", "") is None or m.get("tool_calls") for m in plain):
                return self._in_another_form(plain, offered, generation_prompt, error)
            raise self._refusal(messages, error) from error

    def _in_another_form(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, generation_prompt: bool, error: Exception
    ) -> str:
        """For a template that fails on a call: arguments as JSON text or as an object, `content` None or ""."""
        for content in (None, ""):  # transformers leaves out what is None; a call is lost by some if it is ""
            for arguments in (_as_they_are, _as_text, _as_object):
                with suppress(Exception):
                    filled = [{**m, "content": content} if m.get("content", "") is None else m for m in messages]
                    filled = [_with_arguments(m, arguments) for m in filled]
                    return self._rendered(filled, tools, generation_prompt, whole=True)
        raise self._refusal(messages, error) from error

    def _refusal(self, messages: Sequence[Mapping[str, Any]], error: Exception) -> RenderingError:
        roles = [m.get("role") for m in messages]
        hint = "Change the data, or give the model another template."
        if "system" in roles and not self.fold_system:
            hint = "Change the data, set fold_system, or give the model another template."
        complaint = str(error).rstrip()
        complaint += "" if complaint.endswith((".", "!", "?")) else "."
        return RenderingError(
            f"The {self.name}'s chat template cannot render a conversation with roles {roles}: {complaint} {hint}"
        )

    @cached_property
    def _refuses_system(self) -> bool:
        """Does the template refuse a system message, or drop it?"""
        system, user = {"role": "system", "content": _PROBE}, {"role": "user", "content": "hi"}
        return not self._keeps([system, user])

    @cached_property
    def _wants_parts(self) -> bool:
        """Does the template keep the text of content in parts, and lose that of a string?"""
        user = {"role": "user", "content": _PROBE}
        return not self._keeps([user]) and self._keeps([_in_parts(user)])

    def _keeps(self, messages: list[dict[str, Any]]) -> bool:
        try:
            return _PROBE in self._rendered(messages, None, True)
        except Exception:
            return False

    def reads(self, field: str) -> bool:
        """Does the template name a field of messages?"""
        return self.exists and field in str(self.tokenizer.chat_template)

    def _rendered(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, generation_prompt: bool, whole: bool = False
    ) -> str:
        """What `apply_chat_template` gives; with `whole`, fields that are None are not left out."""
        arguments: dict[str, Any] = {"tools": tools, "tokenize": False, "add_generation_prompt": generation_prompt}
        if type(self.tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
            # No template, but code.
            return str(self.tokenizer.apply_chat_template(messages, **arguments, **self.kwargs))
        arguments["tools"] = tools and [get_json_schema(tool) if callable(tool) else tool for tool in tools]
        arguments["chat_template"] = self.tokenizer.get_chat_template(tools=tools)
        names = {**self.tokenizer.special_tokens_map, **self.kwargs}
        return templates.render({"conversation": messages, **arguments, **names}, whole=whole)

    def _joined(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message with text parts as one string: many templates would print a list as Python spells it."""
        content = message.get("content")
        return dict(message) if content is None else {**message, "content": content_text(message, self.name)}

    def pieces(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Any] | None
    ) -> tuple[list[str], list[int]]:
        """Text around the assistant's earlier turns, generation prompt last, and which turns stand between.

        A turn without text (a bare tool call, say) or of weight 0 is left to the template.

        Returns:
            `k + 1` pieces of text and the message indices of the `k` assistant turns between them.

        Raises:
            RenderingError: the template drops, repeats or reorders an assistant turn.
        """
        replies = [i for i, m in enumerate(messages) if m.get("role") == "assistant" and m.get("weight") != 0]
        turns = [i for i in replies if content_text(messages[i], self.name)]
        base = _unused("SENTINELturn", repr((messages, tools)))
        sentinels = {i: f"{base}{i}x" for i in turns}
        marked = [{**m, "content": sentinels[i]} if i in sentinels else m for i, m in enumerate(messages)]
        rendered = self.text(marked, tools=tools, generation_prompt=True)
        counts = {i: rendered.count(sentinel) for i, sentinel in sentinels.items()}
        if odd := {i: n for i, n in counts.items() if n != 1}:
            raise RenderingError(
                f"The {self.name}'s chat template writes assistant turns {sorted(odd)} {list(odd.values())} times, "
                "expected once each, so they cannot be scored. Use score_turns='last'."
            )
        parts, rest = [], rendered
        for i, sentinel in sentinels.items():
            before, separator, rest = rest.partition(sentinel)
            if not separator:
                raise RenderingError(
                    f"The {self.name}'s chat template writes assistant turn {i} before an earlier one, expected the "
                    "order of the messages. Use score_turns='last'."
                )
            parts.append(before)
        return [*parts, rest], turns


def opens_thinking(text: str) -> bool:
    """Does a generation prompt end inside a think block?"""
    return bool(_THINK_OPENED.search(text))


def with_thinking(text: str, thinking: bool | None) -> str:
    """The generation prompt with its think block opened or not, as the other side has it; None leaves it alone."""
    if thinking is None or thinking == opens_thinking(text):
        return text
    return _THINK_EMPTY.sub("", text) + "<think>\n" if thinking else _THINK_OPENED.sub("", text)


def without_thinking(text: str) -> str:
    """The generation prompt with no think block at its end, neither an open one nor an empty one."""
    return _THINK_OPENED.sub("", _THINK_EMPTY.sub("", text))


def without_empty_thinking(text: str) -> str:
    """What a template writes before a reply, without the empty think block at its start."""
    return _THINK_EMPTY_FIRST.sub("", text)


def missing_from(
    text: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> list[str]:
    """Which kinds of things a template left out of `text`: roles other than the assistant's, "tools", "tool_calls".

    A template may trim or escape, so the longest word stands for a message, and the name for a tool or a call.
    """
    expected = [(str(m.get("role")), content_text(m, "")) for m in messages if m.get("role") != "assistant"]
    expected += [("tools", str(tool.get("function", tool).get("name", ""))) for tool in tools or ()]
    calls = [call for m in messages for call in m.get("tool_calls") or () if isinstance(call, Mapping)]
    expected += [("tool_calls", str(call.get("function", call).get("name", ""))) for call in calls]
    lost = [kind for kind, content in expected if max(_WORD.findall(content), key=len, default="") not in text]
    return list(dict.fromkeys(lost))


def _unused(word: str, text: str) -> str:
    """`word`, made longer until it does not occur in `text`."""
    while word in text:
        word += "x"
    return word


def _folded(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The system message at the head of the first user's; a user's message of its own where there is none."""
    system, rest = messages[0], messages[1:]
    if not rest or rest[0].get("role") != "user":
        return [{**system, "role": "user"}, *rest]
    text = "\n\n".join(part for part in (system.get("content"), rest[0].get("content")) if part)
    return [{**rest[0], "content": text}, *rest[1:]]


def _as_they_are(arguments: Any) -> Any:
    return arguments


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _as_object(arguments: Any) -> Any:
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def _with_arguments(message: dict[str, Any], form: Callable[[Any], Any]) -> dict[str, Any]:
    """The message with the arguments of its calls in another form."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        function = {**function, "arguments": form(function.get("arguments", {}))}
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls}


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _transcript(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, generation_prompt: bool) -> str:
    """For a model without a template: who says what, in plain text.

    The reply starts on a line of its own: after "Assistant: " its first token would have to be one without the space
    that the text before already holds, which such a model hardly ever saw.
    """
    turns = [f"Tools: {json.dumps(list(tools), ensure_ascii=False)}\n\n"] if tools else []
    for message in messages:
        parts = [content_text(message, "transcript")]
        parts += [json.dumps(call, ensure_ascii=False, default=str) for call in message.get("tool_calls") or ()]
        speaker = str(message.get("role")).capitalize()
        between = "\n" if message.get("role") == "assistant" else " "
        turns.append(f"{speaker}:{between}" + "\n".join(part for part in parts if part) + "\n\n")
    return "".join(turns) + ("Assistant:\n" if generation_prompt else "")
