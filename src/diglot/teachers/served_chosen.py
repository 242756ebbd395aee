"""A teacher behind an address that scores chosen ids: what the student names, exactly, and the stop set with the text.

Shapes: `Q` questions of one scored token and one id, `T` tokens of a text.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from diglot.arrays import Floats, Ints
from diglot.batches import PackedSide
from diglot.errors import TeacherError
from diglot.http.client import Client, Refused, answers_of
from diglot.objectives.levels import Level
from diglot.rendering import Renderer
from diglot.teachers.chosen import NotGiven, score_chosen
from diglot.teachers.probe import probe_ids
from diglot.teachers.served import Row, ServedTeacher
from diglot.teachers.wire import VLLM, Asking, TokenScores, Wire

logger = logging.getLogger(__name__)

_TOLERANCE = 0.1  # nats, mean over the probe: two passes of bfloat16 stay below


class ServedChosen(ServedTeacher):
    """A served teacher that is asked for the ids that an objective names.

    Where no objective wants the likeliest ids, the text's own log-probs and stop come the same way: only scored rows,
    four bytes a number, and the whole stop set in the same request.
    """

    level = Level.CHOSEN

    def __init__(
        self, client: Client, wire: Wire, renderer: Renderer, max_length: int | None = None, concurrency: int = 8
    ) -> None:
        super().__init__(client, wire, renderer, max_length, concurrency)
        self.top = 0  # until an objective wants some

    def _score(self, ids: Ints, at: Ints, stops: Ints) -> Row:
        if self.top:
            return super()._score(ids, at, stops)
        first = int(at[0]) - 1
        others = list(self.renderer.stop_ids) if len(stops) else []
        chosen = np.full((len(ids) - 1 - first, 1 + len(others)), -1, dtype=np.int64)
        chosen[at - 1 - first, 0] = ids[at]
        for t in stops:
            chosen[t - 1 - first, 1:] = [-1 if i == ids[t] else i for i in others]
        scores = self._score_chosen(ids, first, chosen)
        logps = np.full(len(ids), np.nan)
        logps[at] = scores[at - 1 - first, 0]
        mass = {int(t): float(np.logaddexp.reduce(scores[t - 1 - first])) for t in stops}
        nothing = np.zeros((len(ids), 0))
        return Row(TokenScores(logps, nothing.astype(np.int64), nothing), mass)

    def chosen(self, side: PackedSide, token: Tensor, ids: Tensor) -> Tensor:
        """Log-probs of `ids` in the rows that predict the scored tokens `token`, `[Q]` nats each, on the CPU."""
        texts, width = side.input_ids.cpu().numpy(), side.input_ids.shape[1]
        place, wanted = side.rows.cpu().numpy()[token.cpu().numpy()], ids.cpu().numpy()
        logps = torch.zeros(len(wanted))
        places, requests = [], []
        for b in np.unique(place // width):
            here = np.flatnonzero(place // width == b)
            at, order = place[here] % width, np.argsort(place[here], kind="stable")
            # Questions about one row stand beside each other in it, in the order in which they came.
            slot = np.empty(len(here), dtype=np.int64)
            sorted_at = at[order]
            slot[order] = np.arange(len(here)) - np.searchsorted(sorted_at, sorted_at)
            first, last = int(sorted_at[0]), int(sorted_at[-1])
            chosen = np.full((last + 1 - first, int(slot.max()) + 1), -1, dtype=np.int64)
            chosen[at - first, slot] = wanted[here]
            text = texts[b, : last + 2]
            self._check_length(text, int(b))
            places.append(torch.from_numpy(here))
            requests.append(self._pool.submit(self._entries, text, first, chosen, at - first, slot))
        for own, values in zip(places, answers_of(requests), strict=True):
            logps[own] = torch.from_numpy(values).float()
        return logps

    def _entries(self, text: Ints, first: int, chosen: Ints, row: Ints, slot: Ints) -> Floats:
        return self._score_chosen(text, first, chosen)[row, slot]

    def _score_chosen(self, ids: Ints, first: int, chosen: Ints) -> Floats:
        with self._explained(ids):
            return score_chosen(self.client, self.wire.info.model, ids.tolist(), first, chosen)


def gives_chosen(client: Client, wire: Wire, renderer: Renderer) -> bool:
    """Does the server score chosen ids, and are they its own log-probs? `TeacherError` if they are others."""
    if not isinstance(wire, VLLM):
        return False
    ids = probe_ids(renderer)[: wire.info.longest]
    own, first = np.asarray(ids), len(ids) // 2
    # Each row: the token that follows, nothing, and the token before, which the next row must not be confused with.
    rows = np.arange(first, len(ids) - 1)
    chosen = np.stack([own[rows + 1], np.full(len(rows), -1), own[rows]], axis=-1)
    try:
        scores = score_chosen(client, wire.info.model, ids, first, chosen)
    except (Refused, NotGiven) as error:
        logger.info("%s does not score chosen ids: %s", client.url, error)
        return False
    theirs = wire.score(client, ids, Asking(top=1)).logps[rows + 1]
    gap = float(np.abs(scores[:, 0] - theirs).mean())
    if not gap <= _TOLERANCE:
        raise TeacherError(
            f"{client.url} scores chosen ids {gap:.2f} nats a token from its own log-probs of the same text, expected "
            f"at most {_TOLERANCE}: their rows stand elsewhere, or are tempered. Start it with --logprobs-mode "
            "raw_logprobs, or without --enable-scale-out."
        )
    return True
