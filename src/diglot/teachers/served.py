"""A teacher behind an address: it reads the ids that a local one would, and gives log-probs instead of hidden states.

Shapes: `N` scored tokens of a batch, `K` likeliest ids of a row.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from diglot.arrays import Ints
from diglot.batches import PackedSide
from diglot.errors import TeacherError
from diglot.http.client import Client, Refused, answers_of
from diglot.objectives.levels import Level
from diglot.rendering import Renderer
from diglot.teachers.wire import Asking, TokenScores, Wire

T = TypeVar("T")

STOP_TOLERANCE = 1e-4
"""Nats by which the log of a stop set's mass may be too small before the missing stop ids are asked for."""
_TOP_WITH_STOPS = 8


@dataclass(frozen=True)
class TextScores:
    """What a served teacher says about the scored tokens of a batch, in nats, on the CPU; constants."""

    written: Tensor  # float32 [N], log-prob of the id that was written
    logps: Tensor  # float32 [N], the same, and for stop the log of the mass of the whole stop set
    top_ids: Tensor  # int64 [N, K], best first, -1 where the server gave fewer
    top_logps: Tensor  # float32 [N, K], -inf there

    def text(self, stop_as_set: bool) -> Tensor:
        """Log-probs of the text, `[N]`: stop as one event, or as the id that was written."""
        return self.logps if stop_as_set else self.written


class Pending(Generic[T]):
    """Requests under way. `result` waits for them; `joined` makes of their answers what was asked for."""

    def __init__(self, requests: Sequence[Future[Any]], joined: Callable[[list[Any]], T]) -> None:
        self._requests, self._joined = requests, joined
        self._result: T | None = None

    def result(self) -> T:
        """What was asked for, once all answers have come.

        Raises:
            TeacherUnavailable: the server gave no answer within the budget.
            TeacherError: an answer that cannot be used.
        """
        if self._result is None:
            self._result = self._joined(answers_of(self._requests))
        return self._result


@dataclass(frozen=True)
class Row:
    """Scores of one text and, for each of its stops, the log of the stop set's mass."""

    scores: TokenScores
    stops: dict[int, float]


class ServedTeacher:
    """Scores packed batches by asking a server.

    Args:
        client: the connection.
        wire: the form that the server speaks.
        renderer: what the served model reads; holds its tokenizer and vocabulary.
        max_length: longest input in tokens; the server's window less one (it must generate one) when that is shorter.
        concurrency: requests under way at a time.

    `serving.connect_server` finds out whether the server can be a teacher.
    """

    level = Level.TOP_K

    def __init__(
        self, client: Client, wire: Wire, renderer: Renderer, max_length: int | None = None, concurrency: int = 8
    ) -> None:
        self.client, self.wire, self.renderer = client, wire, renderer
        self.max_length = min((n for n in (max_length, wire.info.longest) if n is not None), default=None)
        self.top = _TOP_WITH_STOPS if len(renderer.stop_ids) > 1 else 1
        weakref.finalize(self, client.close)
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="diglot-teacher")

    @property
    def name(self) -> str:
        """The model's name at the server, and where that is."""
        return f"{self.model_name} at {self.client.url}"

    @property
    def model_name(self) -> str:
        """The model's name at the server."""
        return str(self.wire.info.model)

    def to(self, device: torch.device | str) -> None:
        """Nothing to move."""

    def break_off(self) -> None:
        """Give up what is under way; the connection stays usable."""
        self.client.break_off()

    def close(self) -> None:
        """Break off requests and let go of the connections."""
        self.client.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def want(self, top: int) -> None:
        """From now on ask for at least the likeliest `top` ids. `TeacherError` if the server gives fewer."""
        if top <= self.top:
            return
        ids = [int(self.renderer.stop_id)] * 2
        try:
            self.wire.score(self.client, ids, Asking(top=top))
        except Refused as error:
            raise TeacherError(
                f"An objective reads the teacher's likeliest {top} ids, and the server says {error.answer[:200]!r}. "
                f"Start it so that it gives {top} (vLLM: --max-logprobs {top}), or give the objective a smaller k."
            ) from None
        self.top = top

    # ---- a batch -----------------------------------------------------------------------------------------------

    def ask(self, side: PackedSide, stop_as_set: bool = True) -> Pending[TextScores]:
        """Send what a batch needs; the answers come while something else is done.

        `stop_as_set=False`: the mass of the whole stop set is not needed.
        """
        requests, stop = [], side.stop.cpu().numpy() & stop_as_set
        for b, own, at in side.texts():
            text = side.host_ids[b, : at[-1] + 2]
            self._check_length(text, b)
            requests.append(self._pool.submit(self._score, text, at + 1, at[stop[own]] + 1))
        return Pending(requests, lambda rows: self.packed(side, rows))

    def scores(self, side: PackedSide) -> TextScores:
        """What the teacher says about a batch."""
        return self.ask(side).result()

    def _check_length(self, ids: Ints, sample: int) -> None:
        if self.max_length is not None and len(ids) > self.max_length:
            raise TeacherError(
                f"Sample {sample} of the batch is {len(ids)} of the teacher's tokens long, and the server's window "
                f"holds {self.max_length} ({self._beginning(ids)}). Set teacher_max_length, or start the server with a "
                "longer window."
            )

    def _beginning(self, ids: Ints) -> str:
        return f"it begins {str(self.renderer.tokenizer.decode(ids[:40]))[:80]!r}"

    def _score(self, ids: Ints, at: Ints, stops: Ints) -> Row:
        """Scores of a text at its tokens `at`, of which `stops` are stops."""
        with self._explained(ids):
            scores = self.wire.score(self.client, ids.tolist(), Asking(top=self.top))
        return Row(scores, {int(t): self._stop_mass(ids, scores, int(t)) for t in stops})

    @contextmanager
    def _explained(self, ids: Ints) -> Iterator[None]:
        """A text that the server refuses is named."""
        try:
            yield
        except Refused as error:
            if error.status not in (400, 413, 422):
                raise
            raise TeacherError(
                f"The server refused a text of {len(ids)} tokens ({self._beginning(ids)}): {error} If its window is "
                f"shorter, set teacher_max_length to what it holds."
            ) from None

    def _stop_mass(self, ids: Ints, scores: TokenScores, t: int) -> float:
        """Log of the probability of the whole stop set at token `t`.

        Stop ids that the server did not name have at most the least mass that it named. Where that could matter they
        are asked for, each in a text of its own.
        """
        known = dict(zip(scores.top_ids[t].tolist(), scores.top_logps[t].tolist(), strict=True))
        known[int(ids[t])] = float(scores.logps[t])
        seen = [known[i] for i in self.renderer.stop_ids if i in known]
        missing = [i for i in self.renderer.stop_ids if i not in known]
        mass = math.fsum(math.exp(x) for x in seen)
        least = min((x for x in scores.top_logps[t].tolist() if x > -math.inf), default=0.0)
        unseen = min(len(missing) * math.exp(least), max(1.0 - mass, 0.0))
        if missing and unseen > STOP_TOLERANCE * mass:
            for i in missing:
                other = self.wire.score(self.client, [*ids[:t].tolist(), i], Asking(top=1))
                seen.append(float(other.logps[t]))
        return float(np.logaddexp.reduce(seen))

    def packed(self, side: PackedSide, rows: Sequence[Row]) -> TextScores:
        """Scores of the single texts in the order of the batch's scored tokens."""
        count = len(side.rows)
        written, logps = np.zeros(count), np.zeros(count)
        top_ids, top_logps = np.full((count, self.top), -1), np.full((count, self.top), -np.inf)
        for (_, here, before), row in zip(side.texts(), rows, strict=True):
            at = before + 1
            written[here] = row.scores.logps[at]
            logps[here] = [row.stops.get(int(t), row.scores.logps[t]) for t in at]
            k = row.scores.top_ids.shape[1]
            top_ids[here, :k], top_logps[here, :k] = row.scores.top_ids[at], row.scores.top_logps[at]
        return TextScores(
            torch.from_numpy(written).float(),
            torch.from_numpy(logps).float(),
            torch.from_numpy(top_ids),
            torch.from_numpy(top_logps).float(),
        )
