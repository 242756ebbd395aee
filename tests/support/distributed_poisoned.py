"""`diglot` as its command starts it, where the loss of rank 1 in the second window is no number.

Each rank prints a digest of its parameters at the start of every window.
"""

from __future__ import annotations

import hashlib
import os
import sys
from typing import Any

import torch

from diglot.cli.main import main
from diglot.trainers import GKDTrainer, MiniLLMTrainer

torch.set_num_threads(1)
RANK = int(os.environ["RANK"])


def poison(trainer: type[Any]) -> None:
    batch_loss, get_batch_samples = trainer.batch_loss, trainer.get_batch_samples

    def poisoned(self: Any, model: Any, batch: Any) -> Any:
        loss = batch_loss(self, model, batch)
        return loss * float("nan") if RANK == 1 and self.state.global_step == 1 else loss

    def watched(self: Any, *arguments: Any) -> Any:
        result = hashlib.sha256()
        for parameter in self.model.parameters():
            result.update(parameter.detach().numpy().tobytes())
        print(f"\nrank {RANK} step {self.state.global_step} has {result.hexdigest()[:16]}", flush=True)
        return get_batch_samples(self, *arguments)

    trainer.batch_loss, trainer.get_batch_samples = poisoned, watched


for one in (GKDTrainer, MiniLLMTrainer):
    poison(one)

if __name__ == "__main__":
    sys.exit(main())
