"""A conversation as text in one model's own chat template, cut where replies stand.

Where content lands is found by rendering with sentinels in its place, never by searching for the content. So a
template may trim, wrap or reorder what it likes: the cut is where it put the turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from diglot.errors import RenderingError

_THINK_OPENED = re.compile(r"<think>\s*\Z")


def content_text(message: Mapping[str, Any], where: str) -> str:
    """The text of a message: a string, or parts that are all text."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        return "".join(str(part["text"]) for part in content)
    raise RenderingError(
        f"{where}: the content of a {message.get('role')!r} message is {type(content).__name__}, expected a "
        f"string or a list "
        "of text parts. Only text can be compared."
    )


class Template:
    """One model's way to write a conversation as text.

    Args:
        name: of the model, for messages: "student", "teacher".
        kwargs: handed to the template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None, name: str) -> None:
        self.tokenizer, self.kwargs, self.name = tokenizer, dict(kwargs or {}), name
        self.exists = bool(getattr(tokenizer, "chat_template", None))

    def text(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        generation_prompt: bool = False,
    ) -> str:
        """`messages` as text. Raises `RenderingError` with the template's own complaint."""
        if not self.exists:
            return _transcript(messages, generation_prompt)
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(m) for m in messages],
                    tools=list(tools) if tools else None,
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                    **self.kwargs,
                )
            )
        except Exception as error:  # jinja's errors, and whatever a template raises
            roles = [m.get("role") for m in messages]
            raise RenderingError(
                f"The {self.name}'s chat template cannot render a conversation with roles {roles}: {error} "
                "Change the data, or give the model another template."
            ) from error

    def pieces(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Any] | None, keep_all: bool
    ) -> tuple[list[str], list[int]]:
        """Text around the assistant's earlier turns, generation prompt last, and which turns stand between.

        Returns:
            `k + 1` pieces of text and the message indices of the `k` assistant turns between them.

        Raises:
            RenderingError: with `keep_all`, when the template drops or repeats an earlier assistant turn.
        """
        turns = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
        marked = [
            {**m, "content": _sentinel(i)} if i in turns and m.get("content") else m for i, m in enumerate(messages)
        ]
        rendered = self.text(marked, tools=tools, generation_prompt=True)
        counts = {i: rendered.count(_sentinel(i)) for i in turns if messages[i].get("content")}
        odd = {i: n for i, n in counts.items() if n != 1}
        if odd and keep_all:
            raise RenderingError(
                f"The {self.name}'s chat template writes assistant turns {sorted(odd)} {list(odd.values())} "
                f"times, expected once "
                "each, so they cannot be scored. Use score_turns='last'."
            )
        kept = [i for i in counts if i not in odd]
        parts, rest = [], rendered
        for i in kept:
            before, _, rest = rest.partition(_sentinel(i))
            parts.append(before)
        parts.append(rest)
        for i in odd:
            parts = [p.replace(_sentinel(i), content_text(messages[i], self.name)) for p in parts]
        return parts, kept


def opens_thinking(text: str) -> bool:
    """Does a generation prompt end inside a think block?"""
    return bool(_THINK_OPENED.search(text))


def with_thinking(text: str, thinking: bool | None) -> str:
    """The generation prompt with its think block opened or not, as the other side has it; None leaves it alone."""
    if thinking is None or thinking == opens_thinking(text):
        return text
    return text + "<think>\n" if thinking else _THINK_OPENED.sub("", text)


def _sentinel(i: int) -> str:
    return f"SENTINELturn{i}x"


def _transcript(messages: Sequence[Mapping[str, Any]], generation_prompt: bool) -> str:
    """For a model without a template: who says what, in plain text."""
    turns = [f"{str(m.get('role')).capitalize()}: {content_text(m, 'transcript')}\n\n" for m in messages]
    return "".join(turns) + ("Assistant: " if generation_prompt else "")
