"""What a student read and wrote, as ids in its own tokens, and the conversation that they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diglot.arrays import Ints
from diglot.errors import DataError

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Transcript:
    """Ids and the runs of them that the student sampled, beside the messages that stand around these runs.

    The text of a sampled turn comes from its ids, never from a message: the message that stands for it is left out.
    `messages[k]` are those between sampled turn `k - 1` and sampled turn `k`; there are as many as turns.
    """

    ids: Ints  # [n] what is scored about: the whole context, or the completion alone
    turns: tuple[tuple[int, int], ...]  # [first, last + 1) of each sampled run, its stop token with it
    messages: tuple[tuple[Message, ...], ...]
    tools: tuple[Mapping[str, Any], ...] | None = None

    @classmethod
    def of_completion(
        cls, prompt: Sequence[Message], completion_ids: Any, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> Transcript:
        """One sampled turn: `ids` are the completion's alone, which follow the student's own prompt."""
        ids = as_ids(completion_ids)
        return cls(ids, ((0, len(ids)),), (tuple(prompt),), _tools(tools))

    @classmethod
    def of_mask(
        cls,
        messages: Sequence[Message],
        ids: Any,
        sampled: Any,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Transcript:
        """Several turns: the whole context and a mask of what was sampled, as engines keep them.

        Args:
            messages: the conversation. Its last assistant messages are the sampled runs, in order; earlier ones, as
                in a prompt with examples, are only read. What a sampled message holds is not looked at.
            ids: `[n]` the context in the student's tokens.
            sampled: `[n]` bool (or 0 and 1), the ids that the student wrote, stop tokens with them.

        Raises:
            DataError: no sampled id, or fewer assistant messages than sampled runs.
        """
        ids, mask = as_ids(ids), np.asarray(sampled).astype(bool).reshape(-1)
        if mask.shape != ids.shape:
            raise DataError(f"There are {len(ids)} ids and a mask of {len(mask)}: give one entry for each id.")
        edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
        turns = tuple((int(low), int(high)) for low, high in edges.reshape(-1, 2))
        own = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
        if not turns or len(own) < len(turns):
            raise DataError(
                f"The mask has {len(turns)} sampled runs and the conversation {len(own)} assistant messages, expected "
                "one message for each run and at least one run. Runs are what the student wrote between what it read."
            )
        places = own[-len(turns) :]
        between = [tuple(messages[low + 1 : high]) for low, high in zip([-1, *places[:-1]], places, strict=True)]
        return cls(ids, turns, tuple(between), _tools(tools))


def as_ids(values: Any) -> Ints:
    """Ids of a list, an array or a tensor, `[n]`."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    result = np.asarray(values)
    if result.size and not np.issubdtype(result.dtype, np.integer):
        raise DataError(f"Token ids are {result.dtype}, expected whole numbers: give the ids as they were sampled.")
    return result.astype(np.int64).reshape(-1)


def _tools(tools: Sequence[Mapping[str, Any]] | None) -> tuple[Mapping[str, Any], ...] | None:
    return tuple(tools) if tools else None
