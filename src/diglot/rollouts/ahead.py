"""The rows of one optimizer step, a window, and the completions written for them, some of them before their turn.

With `rollout_ahead` the student writes for the next window while this one is trained on: with the weights of before
this window's steps. An engine elsewhere does so meanwhile, a student that is trained here at once.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diglot.arrays import Floats, Ids
from diglot.batches import PairReader
from diglot.data import Sample
from diglot.rendering import Conversation
from diglot.rollouts.engine import Completion

logger = logging.getLogger(__name__)

Window = list[list[Sample]]
"""The micro-batches of one optimizer step."""
Row = tuple[Conversation, "Ids | None", int]
"""What is to be written: the conversation, its prompt in the student's ids (None: it is too long), and a seed."""


def rows_of(
    reader: PairReader, window: Window, seeds: Sequence[Sequence[int]], longest: int, *, counted: bool = True
) -> list[list[Row]]:
    """The rows of each micro-batch, as many for each sample as it has seeds, which stand one behind the other.

    Args:
        longest: tokens of a completion.
        counted: note the prompts that leave no room for it.
    """
    rows: list[list[Row]] = []
    for batch, own in zip(window, seeds, strict=True):
        each = len(own) // max(len(batch), 1)
        conversations = [sample.conversation for sample in batch for _ in range(each)]
        prompts = [reader.prompt_ids(c, longest, counted=counted) for c in conversations]
        rows.append(list(zip(conversations, prompts, own, strict=True)))
    return rows


def answered(rows: Sequence[Sequence[Row]]) -> tuple[list[Conversation], list[Ids], list[int]]:
    """Conversations, prompts and seeds of the rows that are written for."""
    with_prompt = [(c, p, seed) for batch in rows for c, p, seed in batch if p is not None]
    return [c for c, _, _ in with_prompt], [p for _, p, _ in with_prompt], [seed for _, _, seed in with_prompt]


@dataclass(frozen=True)
class Waiting:
    """Completions whose turn is to come."""

    prompts: list[Ids]
    written_at: int  # the optimizer step before which the student was what wrote them
    completions: Future[list[Completion]]


class Ahead:
    """The windows of an epoch, and completions that wait for their turn: the optimizer step that trains on them first.

    Args:
        steps: how many optimizer steps lie between writing and training; 0: nothing is written ahead.
        rank: of this process, for the name of its file in a checkpoint.
    """

    def __init__(self, steps: int, rank: int) -> None:
        self.steps, self.rank = steps, rank
        self._source: object = None
        self._epochs = 0
        self._windows: deque[Window] = deque()
        self._waiting: dict[int, Waiting] = {}

    # ---- rows ----------------------------------------------------------------------------------------------------

    def read(self, batches: Iterator[dict[str, Any]], size: int) -> Window:
        """The next window of an epoch, of at most `size` micro-batches; empty at its end."""
        new = batches is not self._source
        if new:
            self._source, self._windows, self._epochs = batches, deque(), self._epochs + 1
        while len(self._windows) <= self.steps:
            window = [batch["samples"] for _, batch in zip(range(size), batches, strict=False)]
            if not window:
                break
            self._windows.append(window)
        if new and self._epochs == 2 and 0 < len(self._windows) <= self.steps:  # a resumed epoch may be a rest
            logger.warning(
                "rollout_ahead writes nothing ahead: an epoch has no more than one window of rows, and before the "
                "first one of an epoch nothing is written. Give more rows, or drop rollout_ahead."
            )
        return self._windows.popleft() if self._windows else []

    def due(self, step: int, last: int) -> tuple[int, Window | None]:
        """The turn to write for at `step`, and its window: None if it is written, in another epoch, or not before
        step `last`, at which the run ends."""
        turn = step + self.steps
        wanted = 0 < self.steps <= len(self._windows) and turn < last and turn not in self._waiting
        return turn, self._windows[self.steps - 1] if wanted else None

    # ---- completions ---------------------------------------------------------------------------------------------

    def put(self, turn: int, waiting: Waiting) -> None:
        """Have completions wait for their turn. Those of turns before the step that wrote them go."""
        self._waiting = {t: one for t, one in self._waiting.items() if t >= waiting.written_at} | {turn: waiting}

    def take(self, turn: int, prompts: Sequence[Ids]) -> tuple[list[Completion], int] | None:
        """The completions of a turn and the step that wrote them, or None. They stay until that turn is over: a
        checkpoint of before its optimizer step still needs them.

        Raises:
            RolloutsUnavailable: the engine is gone; what it had not written is written anew after a resume.
        """
        if turn not in self._waiting:
            return None
        waiting = self._waiting[turn]
        if len(waiting.prompts) == len(prompts) and all(map(np.array_equal, waiting.prompts, prompts)):
            return self._done(turn), waiting.written_at
        self.drop(turn)
        logger.warning(
            "The completions that were written ahead for step %d answer other prompts than the %d that come now: they "
            "are written anew. Was the run resumed with ignore_data_skip, or with other data?",
            turn,
            len(prompts),
        )
        return None

    def drop(self, turn: int | None = None) -> None:
        """Wait for nothing more, or not for one turn."""
        for one in [*self._waiting] if turn is None else [turn]:
            self._waiting.pop(one).completions.cancel()

    def _done(self, turn: int) -> list[Completion]:
        try:
            return self._waiting[turn].completions.result()
        except BaseException:
            self._waiting.pop(turn)
            raise

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def save(self, folder: Path, step: int) -> None:
        """Write what waits for `step` and later ones into a checkpoint; waits until the engine has written it."""
        entries = {}
        for turn in [t for t in self._waiting if t >= step]:
            waiting, completions = self._waiting[turn], self._done(turn)
            rows = [
                [prompt.tolist(), one.ids.tolist(), None if one.logps is None else one.logps.tolist()]
                for prompt, one in zip(waiting.prompts, completions, strict=True)
            ]
            entries[turn] = {"written_at": waiting.written_at, "rows": rows}
        if entries:
            (folder / f"ahead-{self.rank}.json").write_text(json.dumps(entries), encoding="utf-8")

    def restore(self, checkpoint: Path) -> None:
        """Take up what `save` wrote, if anything and if it is wanted."""
        path = checkpoint / f"ahead-{self.rank}.json"
        if not self.steps or not path.exists():
            return
        for turn, entry in json.loads(path.read_text(encoding="utf-8")).items():
            done: Future[list[Completion]] = Future()
            done.set_result([Completion(_ids(ids), _logps(logps)) for _, ids, logps in entry["rows"]])
            self._waiting[int(turn)] = Waiting([_ids(p) for p, *_ in entry["rows"]], entry["written_at"], done)


def _ids(values: list[int]) -> Ids:
    return np.array(values, dtype=np.int64)


def _logps(values: list[float] | None) -> Floats | None:
    return None if values is None else np.array(values, dtype=np.float64)
