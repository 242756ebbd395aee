"""Hidden states of other continuations of prefixes of a batch: a tree of tokens, not a row.

A branch is a few tokens that follow a prefix of one row of the batch: "the same text so far, but its last bytes cut
into other tokens". Its tokens stand behind the row and see the prefix and each other only. So a branch costs its own
tokens, not its prefix once more, in the same pass or, from what the model keeps of the batch, in a later one. Models
whose pass cannot take a mask of that form read each branch with its prefix.

Shapes: `B` rows, `T` their length, `N` chosen places, `E` tokens of all branches, in the order of the branches.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from diglot.arrays import Ints
from diglot.batches.sending import sent, sent_together
from diglot.heads.hidden import cache_argument, is_compiled, last_hidden, unwrap

logger = logging.getLogger(__name__)
_known: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # does the model take a mask of trees?


@dataclass(frozen=True)
class Branches:
    """Tokens that follow prefixes of the batch, `[E]` each."""

    ids: Ints
    after: Ints  # place in the flattened `[B * T]` of the last token of the prefix
    depth: Ints  # 0 for the first token of a branch, 1 for the next ...

    def __len__(self) -> int:
        return len(self.ids)


class TreeReading:
    """A batch that is read once, and then behind any of its prefixes.

    Args:
        model: is run in evaluation mode, without gradients.
        input_ids: `[B, T]`, padded on the right.
        attention_mask: `[B, T]`, 0 where padded.
        rows: `[N]`, of the flattened `[B * T]`, whose hidden states are wanted.
    """

    def __init__(self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, rows: Tensor) -> None:
        self.model, self.input_ids, self.attention_mask, self.rows = model, input_ids, attention_mask, rows
        self._cache: Any = None
        self._trees = True

    def first(self, branches: Branches) -> tuple[Tensor, Tensor]:
        """Hidden states `[N, H]` of the batch, and behind every token of the branches, `[E, H]`.

        Equal, up to rounding, to reading every prefix and branch as a text of its own. What the model keeps of the
        batch is kept for `more`.
        """
        self._trees = _takes_trees(self.model) and _no_window(self.model, self.input_ids, branches)
        if self._trees:
            self._cache = DynamicCache()
            return self._tree(branches)
        main = last_hidden(self.model, self.input_ids, self.attention_mask).flatten(0, 1)[self.rows]
        return main, _one_by_one(self.model, self.input_ids, branches)

    def more(self, branches: Branches) -> Tensor:
        """Behind every token of other branches, `[E, H]`; only these tokens are read."""
        if self._trees and _no_window(self.model, self.input_ids, branches):
            return self._tree(branches)[1]
        return _one_by_one(self.model, self.input_ids, branches)

    def _tree(self, branches: Branches) -> tuple[Tensor, Tensor]:
        device, (count, width) = self.input_ids.device, self.input_ids.shape
        row, place = branches.after // width, branches.after % width
        number = np.cumsum(branches.depth == 0) - 1
        slot = np.zeros(len(row), dtype=np.int64)
        for b in np.unique(row):
            slot[row == b] = np.arange(int((row == b).sum()))
        more, kept = int(slot.max(initial=-1)) + 1, int(self._cache.get_seq_length())
        new = 0 if kept else width  # tokens of the batch itself in this pass
        on_host = (row, new + slot, place, branches.depth, branches.ids, number)
        at_row, at, prefix, depth, own_ids, own = sent_together([torch.from_numpy(x) for x in on_host], device)
        ids = torch.cat([self.input_ids[:, :new], self.input_ids[:, :1].expand(-1, more)], dim=1)
        ids[at_row, at] = own_ids
        positions = torch.arange(new + more, device=device).repeat(count, 1)
        positions[at_row, at] = prefix + 1 + depth
        sees = torch.zeros(count, new + more, kept + new + more, dtype=torch.bool, device=device)
        sees[:, :new, :new] = torch.tril(torch.ones(new, new, dtype=torch.bool, device=device))
        sees[:, :new, :new] &= self.attention_mask.bool()[:, None, :new]
        sees[at_row, at, :width] = torch.arange(width, device=device) <= prefix[:, None]
        whose = torch.full((count, more), -1, device=device)
        whose[at_row, at - new] = own
        earlier = torch.tril(torch.ones(more, more, dtype=torch.bool, device=device))
        sees[:, new:, kept + new :] = (whose[:, :, None] == whose[:, None, :]) & earlier
        every = torch.arange(new + more, device=device)
        sees[:, every, kept + every] = True  # padding sees itself, so that no row of the softmax is empty
        options = {cache_argument(self.model): self._cache, "position_ids": positions, "use_cache": True}
        hidden = last_hidden(self.model, ids, sees[:, None], **options)
        main = hidden[:, :new].flatten(0, 1)[self.rows] if new else hidden[:0, 0]
        return main, hidden[at_row, at]


def _one_by_one(model: nn.Module, input_ids: Tensor, branches: Branches) -> Tensor:
    """Each branch with its prefix, as a batch of its own, a few at a time."""
    device, width = input_ids.device, input_ids.shape[1]
    starts = np.flatnonzero(branches.depth == 0)
    ends = np.append(starts[1:], len(branches))
    found: list[Tensor] = []
    for at in range(0, len(starts), 8):
        texts = []
        for low, high in zip(starts[at : at + 8], ends[at : at + 8], strict=True):
            row, place = divmod(int(branches.after[low]), width)
            tail = sent(torch.from_numpy(branches.ids[low:high]), device)
            texts.append(torch.cat([input_ids[row, : place + 1], tail]))
        lengths = [len(t) for t in texts]
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
        shown = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
        mask = sent(shown.long(), device)
        hidden = last_hidden(model, ids, mask)
        for k, (low, high) in enumerate(zip(starts[at : at + 8], ends[at : at + 8], strict=True)):
            found.append(hidden[k, lengths[k] - (high - low) : lengths[k]])
    return torch.cat(found)


def _no_window(model: nn.Module, input_ids: Tensor, branches: Branches) -> bool:
    """Is the text short enough that a sliding window sees all of it, so that one mask is right for every layer?"""
    config = unwrap(model).config.get_text_config()
    window = getattr(config, "sliding_window", None)
    return not window or input_ids.shape[1] + int(branches.depth.max(initial=0)) + 1 <= window


def _takes_trees(model: nn.Module) -> bool:
    """Does a tree give this model's own hidden states? Tried once, on a few tokens."""
    if model not in _known:
        inner = unwrap(model)
        try:
            _known[model] = not is_compiled(model, inner) and _same_on_a_few_tokens(model)
        except (TypeError, ValueError, NotImplementedError, RuntimeError, AttributeError, KeyError, IndexError):
            _known[model] = False  # reading every prefix again is always right
        if not _known[model]:
            logger.warning(
                "%s does not take branches of a text in one pass (a tree mask): each other reading of a text is read "
                "with all that stands before it. The values are the same; a step takes longer.",
                type(inner).__name__,
            )
    return _known[model]


@torch.no_grad()
def _same_on_a_few_tokens(model: nn.Module) -> bool:
    embedding = unwrap(model).get_input_embeddings().weight
    ids = (torch.arange(12, device=embedding.device).reshape(2, 6) + 2) % len(embedding)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    rows = torch.tensor([0, 5, 6, 9], device=ids.device)
    branches = Branches(np.array([5, 3, 4, 7]) % len(embedding), np.array([2, 2, 4, 8]), np.array([0, 1, 0, 0]))
    others = Branches(np.array([2, 9, 6]) % len(embedding), np.array([1, 8, 8]), np.array([0, 0, 1]))
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        main = last_hidden(model, ids, mask).flatten(0, 1)[rows]
        plain = main, *(_one_by_one(model, ids, some) for some in (branches, others))
        reading = TreeReading(model, ids, mask, rows)
        reading._cache = DynamicCache()
        tree = *reading._tree(branches), reading._tree(others)[1]
    finally:
        for module in training:
            module.training = True
    # By rows and their norms: rounding differs with the number of threads and the sizes of products, and channels of
    # some models are a hundred times as large as the rest. What a wrong mask or position changes is far above this.
    tolerance = max(torch.finfo(main.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5
    return all(
        float(((a - b).float().norm(dim=-1) / a.float().norm(dim=-1)).max()) <= tolerance
        for a, b in zip(plain, tree, strict=True)
    )
