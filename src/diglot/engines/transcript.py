"""What a student read and wrote, as ids in its own tokens, and the conversation that they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diglot.arrays import Ints
from diglot.errors import DataError, VocabularyError
from diglot.vocabulary import Vocabulary

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

    def __post_init__(self) -> None:
        made = as_ids(self.ids), _turns(self.turns), _runs(self.messages), _tools(self.tools)
        for name, value in zip(("ids", "turns", "messages", "tools"), made, strict=True):
            object.__setattr__(self, name, value)  # the class is frozen
        _check_turns(self.turns, len(self.ids), len(self.messages))

    @classmethod
    def of_completion(
        cls, prompt: Sequence[Message], completion_ids: Any, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> Transcript:
        """One sampled turn: `ids` are the completion's alone, which follow the student's own prompt.

        Raises:
            DataError: a prompt that ends with an assistant's message, which would be read as a turn before the
                completion.
        """
        ids, messages = as_ids(completion_ids), _messages(prompt)
        if messages and messages[-1]["role"] == "assistant":
            raise DataError(
                f"The prompt ends with an assistant's message ({str(messages[-1].get('content'))[:40]!r}): the teacher "
                "would read it and then the completion as another turn. Give the messages before the completion, or "
                "the whole context and `sampled`."
            )
        return cls(ids, ((0, len(ids)),), (messages,), tools)  # type: ignore[arg-type]  # made a tuple of

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
            DataError: no sampled id, fewer assistant messages than sampled runs, or a mask of other values.
        """
        ids, mask, messages = as_ids(ids), _mask(sampled), _messages(messages)
        if mask.shape != ids.shape:
            raise DataError(f"There are {len(ids)} ids and a mask of shape {mask.shape}: give one entry for each id.")
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
        return cls(ids, turns, tuple(between), tools)  # type: ignore[arg-type]  # made a tuple of


def check_ids(ids: Ints, vocabulary: Vocabulary, read: NDArray[np.bool_] | None = None) -> None:
    """`VocabularyError` with the first position of `ids` `[n]`, where `read` or anywhere, that holds no token's id."""
    outside = (ids < 0) | (ids >= len(vocabulary))
    wrong = np.flatnonzero(outside if read is None else outside & read)
    if len(wrong):
        raise VocabularyError(
            f"Position {wrong[0]}: id {ids[wrong[0]]} is not in the student's vocabulary of {len(vocabulary)}. It is a "
            "mask value such as -100, or the ids are another model's: pass the ids that this student sampled."
        )


def as_ids(values: Any) -> Ints:
    """Ids of one text as a list, an array or a tensor, `[n]`. `DataError` for anything else."""
    result = to_numpy(values, "Token ids")
    if result.size and not np.issubdtype(result.dtype, np.integer):
        raise DataError(f"Token ids are {result.dtype}, expected whole numbers: give the ids as they were sampled.")
    if result.ndim != 1:
        raise DataError(f"Token ids have shape {result.shape}, expected [n]: give the ids of one text at a time.")
    if result.size and int(result.max()) > np.iinfo(np.int64).max:
        raise DataError(
            f"A token id is {int(result.max())}, which no vocabulary has: give the ids as they were sampled."
        )
    return result.astype(np.int64)


def _mask(values: Any) -> NDArray[np.bool_]:
    """`[n]` of what is 0 and 1: labels with -100, or weights, are no mask, and any number but 0 would count as true."""
    result = to_numpy(values, "The mask of sampled ids")
    known = np.issubdtype(result.dtype, np.bool_) or np.issubdtype(result.dtype, np.number)
    wrong = result[(result != 0) & (result != 1)] if known else result.reshape(-1)
    if wrong.size:
        raise DataError(f"The mask of sampled ids holds {wrong[0]!s:.40}, expected 0 and 1, or False and True, alone.")
    return result.astype(np.bool_)


def to_numpy(values: Any, name: str) -> NDArray[Any]:
    """A list, an array or a tensor of any device and float type. `DataError` for what none can be made of."""
    try:
        if hasattr(values, "detach"):
            values = values.detach().to("cpu")
            values = values.double() if values.is_floating_point() else values  # numpy has no bfloat16
        return np.asarray(values)
    except ValueError:
        raise DataError(f"{name} are lists of several lengths, expected [n]: give one text at a time.") from None
    except (TypeError, RuntimeError):  # a sparse tensor, or one without data
        raise DataError(
            f"{name} are {type(values).__name__} that numpy cannot read, expected a list, an array or a dense tensor."
        ) from None


def _messages(messages: Any) -> tuple[Message, ...]:
    """Messages as they are kept. `DataError` for what is no conversation."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Iterable):
        raise DataError(f"The conversation is {type(messages).__name__}, expected a list of messages. {_AS_MESSAGES}")
    result = tuple(messages)
    _check_messages(result)
    return result


_AS_MESSAGES = "Give each as {'role': ..., 'content': ...}."


def _check_messages(messages: Sequence[Any]) -> None:
    for at, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"Message {at} is {message!r:.80}, expected a mapping with a role. {_AS_MESSAGES}")


def _turns(turns: Any) -> tuple[tuple[int, int], ...]:
    """As they are kept. `DataError` for what are no pairs of whole numbers."""
    try:
        return tuple((index(low), index(high)) for low, high in turns)
    except (TypeError, ValueError):
        raise DataError(
            f"The sampled turns are {turns!r:.80}, expected pairs of whole numbers: ((first, last + 1), ...)."
        ) from None


def _runs(messages: Any) -> tuple[tuple[Message, ...], ...]:
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Iterable):
        raise DataError(f"The messages are {type(messages).__name__}, expected a list of messages before each turn.")
    return tuple(_messages(between) for between in messages)


def _check_turns(turns: Sequence[tuple[int, int]], count: int, between: int) -> None:
    """`DataError` unless the turns are runs of the ids, in order, with messages before each."""
    if not turns or len(turns) != between:
        raise DataError(
            f"A transcript has {len(turns)} sampled turns and {between} runs of messages, expected one run before each "
            "turn, and at least one turn."
        )
    edge = 0
    for low, high in turns:
        if not edge <= low <= high <= count:
            raise DataError(
                f"A sampled turn is [{low}, {high}) of {count} ids, expected turns in order, each behind the one "
                f"before (here from {edge}) and within the ids."
            )
        edge = high


def _tools(tools: Any) -> tuple[Mapping[str, Any], ...] | None:
    if tools is not None and (isinstance(tools, (str, Mapping)) or not isinstance(tools, Iterable)):
        raise DataError(f"The tools are {type(tools).__name__}, expected a list of them, or None.")
    return tuple(tools) if tools else None
