"""A teacher behind an address that gives hidden states: whole rows, formed here by its own norm and head.

Shapes: `N` scored tokens of a batch, `E` tokens of branches, `H` the width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from diglot.arrays import Ints
from diglot.batches import PackedSide
from diglot.errors import TeacherError, TeacherUnavailable
from diglot.heads import Branches
from diglot.http.client import Client, answers_of
from diglot.objectives.levels import Level
from diglot.rendering import Renderer
from diglot.teachers.probe import probe_ids
from diglot.teachers.readout import NoWeights, Readout
from diglot.teachers.served import Pending, ServedTeacher
from diglot.teachers.states import NotHere, read_states, request_states
from diglot.teachers.wire import VLLM, Asking, Wire

logger = logging.getLogger(__name__)

_TOLERANCE = 0.1  # nats, mean over the probe: roundings of bfloat16 stay below, another layer or head does not
_PROBE_SECONDS, _ATTEMPTS = 5.0, 2


class ServedRows(ServedTeacher):
    """A served teacher whose hidden states are read, so that every objective works with it.

    The text is sent without its last token: nothing is predicted from that. Of the states only rows that predict a
    scored token are read, `H` numbers each. A branch is a request of its own, whose prefix the server has cached.
    """

    level = Level.HIDDEN

    def __init__(
        self,
        client: Client,
        wire: Wire,
        renderer: Renderer,
        max_length: int | None = None,
        concurrency: int = 8,
        *,
        readout: Readout,
    ) -> None:
        super().__init__(client, wire, renderer, max_length, concurrency)
        self.readout, self.head = readout, readout.head

    def to(self, device: torch.device | str) -> None:
        """Move norm and head."""
        self.readout.to(device)

    def want(self, top: int) -> None:
        """Whole rows are at hand, so any number."""

    def ask(self, side: PackedSide, stop_as_set: bool = True) -> Pending[Tensor]:  # type: ignore[override]
        """Send a batch's texts; the states come while something else is done."""
        requests = []
        for b, _, at in side.texts():
            text = side.host_ids[b, : at[-1] + 1]
            self._check_length(text, b)
            requests.append(self._pool.submit(self._states, text, at))
        return Pending(requests, self._normed)

    def hidden(self, side: PackedSide) -> Tensor:
        """As `LocalTeacher.hidden`: the state that predicts each scored token, `[N, H]`."""
        return self.ask(side).result()

    def behind(self, side: PackedSide, branches: Branches) -> Tensor:
        """The states behind every token of the branches, `[E, H]`."""
        ids, width = side.host_ids, side.host_ids.shape[1]
        starts = np.flatnonzero(branches.depth == 0)
        requests = []
        for low, high in zip(starts, np.append(starts[1:], len(branches)), strict=True):
            b, place = divmod(int(branches.after[low]), width)
            text = np.concatenate([ids[b, : place + 1], branches.ids[low:high]])
            self._check_length(text, b)
            requests.append(self._pool.submit(self._states, text, np.arange(place + 1, len(text))))
        return self._normed(answers_of(requests))

    def _normed(self, states: list[Tensor]) -> Tensor:
        """What the head reads, `[N, H]` on its device, a constant."""
        empty = next(self.readout.norm.parameters()).new_zeros(0, self.readout.width)
        return self.readout.hidden(torch.cat(states) if states else empty)

    def _states(self, ids: Ints, at: Ints) -> Tensor:
        """States of one text at some of its tokens, before the norm."""
        first, failed = int(at[0]), None
        for _ in range(_ATTEMPTS):
            with self._explained(ids):
                name = request_states(self.client, self.wire.info.model, ids.tolist())
            if name is None:
                raise TeacherError(
                    f"{self.client.url} named no file of hidden states in its answer, as it did at the start. Was it "
                    "started anew without --kv-transfer-config?"
                )
            try:
                states = read_states(name, ids.tolist(), self.readout.width, first, self.client.timeout)
                return states[torch.from_numpy(at) - first]
            except NotHere as error:
                failed = error
        raise TeacherUnavailable(f"{failed} It was asked {_ATTEMPTS} times.") from failed


def gives_states(client: Client, wire: Wire, renderer: Renderer, load: Callable[[], Readout]) -> Readout | None:
    """Norm and head for a server that hands out its model's hidden states; None, and the log says why, for another.

    Args:
        load: reads norm and head from the teacher's weights. Called only where the server gives states.

    Raises:
        TeacherError: it gives states, and with these weights they are not its own log-probs: another layer, or
            another model.
    """
    if not isinstance(wire, VLLM):
        return None
    ids = probe_ids(renderer)[: wire.info.longest]
    name = request_states(client, wire.info.model, ids)
    if name is None:
        return None
    try:
        readout = load()
        states = read_states(name, ids, readout.width, 0, min(_PROBE_SECONDS, client.timeout))
    except (NotHere, NoWeights) as error:
        logger.warning("%s hands out hidden states, and they are not used: %s", client.url, error)
        return None
    logits = readout.head(readout.hidden(states[:-1])).log_softmax(-1)
    ours = logits.gather(-1, torch.tensor(ids[1:], device=logits.device)[:, None])[:, 0].double().cpu().numpy()
    theirs = wire.score(client, ids, Asking(top=1)).logps[1:]
    gap = float(np.abs(ours - theirs).mean())
    if not gap <= _TOLERANCE:
        raise TeacherError(
            f"The hidden states of {client.url} give log-probs {gap:.2f} nats a token from those that it gives itself, "
            f"expected at most {_TOLERANCE}. They are not what its model's last layer leaves, or the weights here are "
            "another model's: start it with eagle_aux_hidden_state_layer_ids [number of layers], and name its model in "
            "teacher_tokenizer_name_or_path."
        )
    logger.info("teacher: %s hands out hidden states (%.1e nats from its own log-probs)", client.url, gap)
    return readout
