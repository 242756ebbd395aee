"""Log-probs of completions that the student in training wrote itself and is trained on later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from diglot.arrays import Ids
from diglot.batches import padded
from diglot.batches.sending import sent
from diglot.heads import Head, evaluating, hidden_at_rows, token_logps
from diglot.rollouts.engine import Completion


@torch.no_grad()
def with_logps(
    model: PreTrainedModel,
    head: Head,
    prompts: Sequence[Ids],
    completions: Sequence[Completion],
    pad_id: int,
    *,
    at_a_time: int,
    chunk_rows: int,
) -> list[Completion]:
    """The completions with the log-probability in nats of each id as `model` is now, before temperature and nucleus.

    Args:
        head: the model's.
        prompts: one for each completion.
        at_a_time: completions in one forward pass.
        chunk_rows: rows of logits that exist at a time.
    """
    scored: list[Completion] = []
    for begin in range(0, len(completions), at_a_time):
        some, fronts = completions[begin : begin + at_a_time], prompts[begin : begin + at_a_time]
        logps = _logps(model, head, fronts, [one.ids for one in some], pad_id, chunk_rows).double().cpu().numpy()
        parts = np.split(logps, np.cumsum([len(one.ids) for one in some])[:-1])
        scored += [replace(one, logps=own) for one, own in zip(some, parts, strict=True)]
    return scored


def _logps(
    model: PreTrainedModel, head: Head, prompts: Sequence[Ids], completions: Sequence[Ids], pad_id: int, rows: int
) -> Tensor:
    """Log-probs of all ids of some completions, one behind the other."""
    texts = [np.concatenate(both) for both in zip(prompts, completions, strict=True)]
    ids, mask = padded(texts, pad_id)
    predicting = [
        row * ids.shape[1] + np.arange(len(prompt) - 1, len(text) - 1)
        for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    at = np.concatenate(predicting)
    input_ids, attention_mask, places, targets = (
        sent(torch.from_numpy(x), model.device) for x in (ids, mask, at, np.concatenate(completions))
    )
    with evaluating(model):
        hidden = hidden_at_rows(model, input_ids, attention_mask, places, (ids, at))
    none = torch.zeros_like(targets, dtype=torch.bool)  # the very id that was sampled, not the whole stop set
    return token_logps(hidden, head, targets, none, [int(targets[0])] if len(targets) else [0], rows)
