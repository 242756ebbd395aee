"""What every way of writing completions has in common: ids in, ids out, and what the writer says about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedModel

from diglot.arrays import Floats, Ids


@dataclass(frozen=True)
class Completion:
    """What was sampled for one prompt.

    `ids` end with the stop id that was sampled; without one the completion was cut. `logps` are the engine's own
    log-probabilities of these ids in nats, of the model's distribution before temperature, top-k and nucleus; None
    where the engine runs the very model that is trained and has nothing else to say.
    """

    ids: Ids
    logps: Floats | None = None


class RolloutEngine(Protocol):
    """Writes the student's completions, here or elsewhere."""

    @property
    def own_weights(self) -> bool:
        """Does it hold weights of its own, which `sync` must renew?"""

    @property
    def elsewhere(self) -> bool:
        """Does it write on hardware of its own, so that training can go on meanwhile?"""

    def sync(self, model: PreTrainedModel) -> None:
        """Take over the weights of `model` as they are now. Called by one process, with nothing under way."""

    def write(
        self, model: PreTrainedModel, prompts: Sequence[Ids], *, max_new_tokens: int, seed: int | Sequence[int]
    ) -> list[Completion]:
        """One completion for each prompt, in order.

        `seed`: one for each prompt, or one from which they follow.
        """

    def break_off(self) -> None:
        """Repeat nothing of what is under way."""

    def close(self) -> None:
        """Let go of connections and memory."""
