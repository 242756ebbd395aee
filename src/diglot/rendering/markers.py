"""Names of control tokens that stand in the text of messages: one side would read a turn there that the other does not.

`read`, the default, is what a served model does: the names become control tokens. `refuse` raises, `text` has them read
as the letters that they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal, get_args

from diglot.errors import ConfigError, DataError
from diglot.vocabulary import ByteEncoder

Markers = Literal["read", "refuse", "text"]

CUT = "\U0010fffd"
"""Stands inside a name that is to be read as text: the text is encoded in two at this place."""


class MarkerGuard:
    """What is done about names of control tokens in messages.

    Args:
        name: of the model, for messages.
    """

    def __init__(self, encoder: ByteEncoder, manner: str, name: str) -> None:
        if manner not in get_args(Markers):
            raise ConfigError(f"markers is {manner!r}, expected one of {get_args(Markers)}.")
        self.encoder, self.manner, self.name = encoder, manner, name

    def names_in(self, text: str) -> list[str]:
        """The names of control tokens that this side would read in `text`."""
        ids = self.encoder.encode_markup(text)
        names = self.encoder.vocabulary.names
        read = [names[i] for i in dict.fromkeys(ids[self.encoder.vocabulary.control[ids]].tolist()) if i in names]
        return [name for name in read if name in text]

    def guarded(self, messages: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        """The messages with names cut in two, for `text`.

        Raises:
            DataError: a message holds a name, and the manner is `refuse`.
        """
        if self.manner == "read":
            return messages
        return tuple({k: v if k == "role" else self._guarded(v) for k, v in message.items()} for message in messages)

    def _guarded(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: self._guarded(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._guarded(v) for v in value]
        if not isinstance(value, str) or not (names := self.names_in(value)):
            return value
        if self.manner == "refuse":
            raise DataError(
                f"A message holds {names}, which the {self.name} reads as control tokens, not as text: {value[:80]!r}. "
                "Leave the row out, or set markers to 'text' (read the letters) or 'read' (as a served model does)."
            )
        return self._names.sub(lambda match: match[0][0] + CUT + match[0][1:], value)

    @cached_property
    def _names(self) -> re.Pattern[str]:
        names = sorted((n for n in self.encoder.vocabulary.names.values() if len(n) > 1), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)))
