"""Hidden states of other continuations of prefixes of a batch: a tree of tokens, not a row.

A branch is a few tokens that follow a prefix of one row of the batch: "the same text so far, but its last bytes cut
into other tokens". The batch is read once, and its keys and values are kept; branches are read in later passes, where
they see their prefix and their own tokens only. So a branch costs its own tokens, not its prefix once more. Models
whose pass cannot take a mask of that form read each branch with its prefix.

Shapes: `B` rows, `T` their length, `N` chosen places, `E` tokens of all branches, in the order of the branches.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from diglot.arrays import Ints
from diglot.batches.sending import sent, sent_together
from diglot.heads.hidden import cache_argument, is_compiled, last_hidden, rotates_alike, unwrap

logger = logging.getLogger(__name__)
_known: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # does the model take a mask of trees?
_MASK = 2**26  # a pass' mask has about as many places, each a byte or, in some kernels, a number
_LONGEST = 2048  # tokens of branches in a row of a pass: each is compared with all before it


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
        self._cache = DynamicCache()
        self._trees = True

    def first(self, branches: Branches) -> tuple[Tensor, Tensor]:
        """Hidden states `[N, H]` of the batch, and behind every token of the branches, `[E, H]`.

        Equal, up to rounding, to reading every prefix and branch as a text of its own. What the model keeps of the
        batch is kept for `more`.
        """
        self._trees = _takes_trees(self.model) and _one_mask(self.model, self.input_ids, branches)
        main = self._text()
        return main, self.more(branches) if len(branches) else main[:0]

    def more(self, branches: Branches) -> Tensor:
        """Behind every token of other branches, `[E, H]`; only these tokens are read."""
        if self._trees and _one_mask(self.model, self.input_ids, branches):
            return torch.cat([self._behind(some) for some in _passes(branches, self.input_ids.shape[1])])
        return _one_by_one(self.model, self.input_ids, branches)

    def _text(self) -> Tensor:
        """The batch alone, of which keys and values are kept if branches can see them: the states at `rows`."""
        options = {cache_argument(self.model): self._cache, "use_cache": True} if self._trees else {}
        return last_hidden(self.model, self.input_ids, self.attention_mask, **options).flatten(0, 1)[self.rows]

    def _behind(self, branches: Branches) -> Tensor:
        """One pass over the branches' tokens alone, packed into rows of which each sees one text."""
        device, width = self.input_ids.device, self.input_ids.shape[1]
        text, place = branches.after // width, branches.after % width
        number = np.cumsum(branches.depth == 0) - 1
        packed, at = _packed(text, number, width)
        texts = np.zeros(int(packed.max()) + 1, dtype=np.int64)
        texts[packed] = text
        on_host = (packed, at, place, branches.depth, branches.ids, number, texts)
        row, column, prefix, depth, own_ids, own, seen = sent_together([torch.from_numpy(x) for x in on_host], device)
        shape = len(texts), int(at.max()) + 1
        ids = self.input_ids[:1, :1].repeat(shape)
        ids[row, column] = own_ids
        positions = torch.zeros_like(ids)
        positions[row, column] = prefix + 1 + depth
        sees = torch.zeros(*shape, width + shape[1], dtype=torch.bool, device=device)
        sees[row, column, :width] = torch.arange(width, device=device) <= prefix[:, None]
        whose = torch.full(shape, -1, device=device)
        whose[row, column] = own
        earlier = torch.tril(torch.ones(shape[1], shape[1], dtype=torch.bool, device=device))
        sees[:, :, width:] = (whose[:, :, None] == whose[:, None, :]) & earlier  # padding sees padding: never nothing
        cache = Cache(layers=[_TextLayer(layer, seen) for layer in self._cache.layers])
        options = {cache_argument(self.model): cache, "position_ids": positions, "use_cache": True}
        return last_hidden(self.model, ids, sees[:, None], **options)[row, column]


class _TextLayer(DynamicLayer):
    """Keys and values of texts: row `i` of a pass sees those of text `texts[i]` and what it adds itself.

    Nothing is kept, so that a pass holds a copy of them for one layer at a time.
    """

    def __init__(self, layer: Any, texts: Tensor) -> None:
        super().__init__()
        self._states, self._texts = (layer.keys, layer.values), texts
        self.keys, self.values, self.is_initialized = layer.keys, layer.values, True  # their length is asked for

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        (keys, values), texts = self._states, self._texts.to(key_states.device)
        return torch.cat([keys[texts], key_states], dim=-2), torch.cat([values[texts], value_states], dim=-2)


def _passes(branches: Branches, width: int) -> Iterator[Branches]:
    """Branches in groups of which one pass stays small: its mask has a place for each token of the text, for each of
    the branches' tokens."""
    first = np.flatnonzero(branches.depth == 0)
    group = first // max(_MASK // width, 1)
    ends = np.append(first[np.flatnonzero(np.diff(group)) + 1], len(branches))
    for low, high in pairwise([0, *ends.tolist()]):
        yield Branches(branches.ids[low:high], branches.after[low:high], branches.depth[low:high])


def _packed(text: Ints, branch: Ints, width: int) -> tuple[Ints, Ints]:
    """Row and column of each token, `[E]`, of a pass over branches of texts that are `width` long.

    A branch stays together, and a row holds branches of one text. Few long rows are padded more, many short ones copy
    a text's keys and values more often: 64 positions of these count as one token.
    """
    first = np.flatnonzero(np.diff(branch, prepend=-1))
    length = np.diff(first, append=len(branch))
    longest = min(int(np.bincount(text[first], weights=length).max()), max(_LONGEST, int(length.max())))
    sizes = np.unique(np.linspace(length.max(), longest, 8).astype(np.int64))
    rows = [_rows_of(text[first], length, int(size)) for size in sizes]
    cost = [(int(row.max()) + 1) * (int((column + length).max()) + width / 64) for row, column in rows]
    row, column = rows[int(np.argmin(cost))]
    return np.repeat(row, length), np.repeat(column - first, length) + np.arange(len(branch))


def _rows_of(text: Ints, length: Ints, size: int) -> tuple[Ints, Ints]:
    """The row of each branch and where it begins in it: those of a text one after another, in rows of at most `size`
    tokens."""
    order = np.argsort(text, kind="stable")
    ends = np.cumsum(length[order])
    starts = ends - length[order]
    last_of_text = np.append(np.flatnonzero(np.diff(text[order])), len(order) - 1)
    begins: list[int] = []  # the first branch of each row
    for low, high in pairwise([0, *(last_of_text + 1).tolist()]):
        while low < high:
            begins.append(low)
            low = min(int(np.searchsorted(ends, starts[low] + size, side="right")), high)
    row, column = np.zeros_like(length), np.zeros_like(length)
    row[order] = number = np.repeat(np.arange(len(begins)), np.diff(begins, append=len(order)))
    column[order] = starts - starts[begins][number]
    return row, column


def _one_by_one(model: nn.Module, input_ids: Tensor, branches: Branches) -> Tensor:
    """Each branch with its prefix, as a batch of its own, a few at a time."""
    device, width = input_ids.device, input_ids.shape[1]
    starts = np.flatnonzero(branches.depth == 0)
    ends = np.append(starts[1:], len(branches))
    states: list[Tensor] = []
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
            states.append(hidden[k, lengths[k] - (high - low) : lengths[k]])
    return torch.cat(states)


def _one_mask(model: nn.Module, input_ids: Tensor, branches: Branches) -> bool:
    """Is the text so short that every layer sees all of it, and a branch its positions as the text does?"""
    config = unwrap(model).config.get_text_config()
    longest = input_ids.shape[1] + int(branches.depth.max(initial=0)) + 1
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return all(not window or longest <= window for window in windows) and rotates_alike(model, longest)


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
        tree = reading._text(), reading._behind(branches), reading._behind(others)
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
