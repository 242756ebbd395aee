"""Rendered samples of one side as one padded batch, with the places of their scored tokens.

Shapes: `B` samples, `T` longest of them, `N` scored tokens of the whole batch in order of sample and position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diglot.arrays import Bools, Ints
from diglot.batches.sending import sent_record
from diglot.rendering import Rendered, Renderer, Role


@dataclass(frozen=True)
class PackedSide:
    """One side of a batch. Row `rows[i]` of the flattened model output `[B * T]` predicts scored token `i`."""

    input_ids: Tensor  # int64 [B, T], padded on the right
    attention_mask: Tensor  # int64 [B, T]
    rows: Tensor  # int64 [N]
    targets: Tensor  # int64 [N], the token that was written
    stop: Tensor  # bool [N], is it the stop event?
    end: Ints  # [N] byte end inside the segment
    segment: Ints  # [N] segment in the batch
    exact: Bools  # [N]
    role: NDArray[np.int8]  # [N]
    host_ids: Ints  # `input_ids` as numpy, wherever those are
    host_rows: Ints  # `rows`

    def to(self, device: torch.device | str) -> PackedSide:
        """The same with its tensors on `device`."""
        return sent_record(self, device)

    def texts(self) -> Iterator[tuple[int, Ints, Ints]]:
        """Of each text with scored tokens: its place in the batch, which tokens those are, and where their rows stand.

        Row `place[k]` of the text predicts its token `place[k] + 1`, which is number `own[k]` of the batch's.
        """
        row, place = np.divmod(self.host_rows, self.host_ids.shape[1])
        for b in np.unique(row).tolist():
            own = np.flatnonzero(row == b)
            yield b, own, place[own]


def pad_id(renderer: Renderer) -> int:
    """What fills shorter rows: masked everywhere, so any id will do."""
    token = renderer.tokenizer.pad_token_id
    return token if token is not None and token < len(renderer.vocabulary) else renderer.stop_id


def padded(texts: Sequence[Ints], pad_id: int, *, left: bool = False) -> tuple[Ints, Ints]:
    """Ids and their attention mask, both `[B, T]`, filled up on the right, or on the `left`."""
    width = max(map(len, texts), default=1)
    ids = np.full((len(texts), width), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        own = slice(width - len(text), width) if left else slice(len(text))
        ids[row, own], mask[row, own] = text, 1
    return ids, mask


def pack(samples: Sequence[Rendered], num_segments: Sequence[int], pad_id: int) -> PackedSide:
    """Pad `samples` to one batch. Segments are numbered through in order of sample, `num_segments` for each.

    A sample whose first token would have to be predicted from nothing cannot occur: prompts are never empty.
    """
    ids, mask = padded([r.ids for r in samples], pad_id)
    rows: list[NDArray[Any]] = []
    segments: list[NDArray[Any]] = []
    first_segment = np.cumsum([0, *num_segments])
    for b, r in enumerate(samples):
        rows.append(b * ids.shape[1] + r.scored - 1)
        segments.append(r.segment[r.scored].astype(np.int64) + first_segment[b])

    def joined(name: str, dtype: type) -> NDArray[Any]:
        return np.concatenate([getattr(r, name)[r.scored] for r in samples] or [np.zeros(0)]).astype(dtype)

    segment = np.concatenate(segments or [np.zeros(0)]).astype(np.int64)
    flat_rows = np.concatenate(rows or [np.zeros(0)]).astype(np.int64)
    role = joined("roles", np.int8)
    return PackedSide(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        rows=torch.from_numpy(flat_rows),
        targets=torch.from_numpy(joined("ids", np.int64)),
        stop=torch.from_numpy(role == Role.STOP),
        end=joined("end", np.int64),
        segment=segment,
        exact=joined("exact", np.bool_),
        role=role,
        host_ids=ids,
        host_rows=flat_rows,
    )
