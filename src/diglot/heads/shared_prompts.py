"""Hidden states at chosen rows, where rows of a batch may begin with the same prompt: it is then read once.

First the distinct prompts go through the model, padded on the left; then the rest of every row, behind the keys and
values of its prompt. The same sums in another order: equal up to rounding, for the gradient as well. It is taken where
it saves a quarter of the tokens or more, on models that are known to agree with it, and the plain pass elsewhere.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from diglot.arrays import Ints
from diglot.batches.sending import sent_together
from diglot.heads.dropout import dropouts
from diglot.heads.hidden import cache_argument, is_compiled, last_hidden, rotates_alike, run_with_hidden, unwrap
from diglot.heads.modes import evaluating

Host = tuple[Ints, Ints]

_PAYS = 0.75  # of the plain pass's tokens at most
_known: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # does the model agree with its plain pass?


@dataclass(frozen=True)
class SharedPrompts:
    """A batch cut into distinct prompts and what follows them. Tensors of the host."""

    prompt_of: list[int]  # the first row that holds each distinct prompt, [U]
    which: Tensor  # int64 [K], the prompt of each row that is read on
    row: Tensor  # int64 [K], its row in the batch
    begin: Tensor  # int64 [B], tokens of the prompt; the last one predicts the first scored token
    end: Tensor  # int64 [B], tokens that predict something
    group: Tensor  # int64 [B], the prompt of each row
    of_token: Tensor  # int64 [N], the row of each scored token
    place: Tensor  # int64 [N], and its predicting place in it

    @property
    def tokens(self) -> int:
        """Tokens of both passes, padding included."""
        prompts = len(self.prompt_of) * int(self.begin[self.prompt_of].max())
        return prompts + len(self.row) * int((self.end - self.begin)[self.row].max() if len(self.row) else 0)


def hidden_at_rows(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, rows: Tensor, host: Host | None = None
) -> Tensor:
    """The hidden states `[N, H]` at `rows` of the flattened `[B * T]`, with gradient if enabled.

    Inputs are padded on the right. `host`: `input_ids` and `rows` as numpy, if they are at hand: nobody waits for the
    device then.
    """
    plan = _plan(model, input_ids, rows, host)
    if plan is None:
        hidden = last_hidden(model, input_ids, attention_mask).flatten(0, 1)
        return hidden[rows.to(hidden.device)]
    return read_once(model, input_ids, plan)


def reads_prompts_once(model: nn.Module, input_ids: Tensor, rows: Tensor) -> bool:
    """Does `hidden_at_rows` take the way by shared prompts for this batch?"""
    return _plan(model, input_ids, rows) is not None


def _plan(model: nn.Module, input_ids: Tensor, rows: Tensor, host: Host | None = None) -> SharedPrompts | None:
    """The cut of the batch, if it is allowed and pays."""
    plan = find_shared_prompts(input_ids, rows, host) if _allowed(model) else None
    pays = plan is not None and plan.tokens <= _PAYS * input_ids.numel()
    return plan if pays and rotates_alike(model, input_ids.shape[1]) and _agrees(model) else None


def find_shared_prompts(input_ids: Tensor, rows: Tensor, host: Host | None = None) -> SharedPrompts | None:
    """How the batch falls into prompts and the rest; None if no two rows begin alike."""
    count, width = input_ids.shape
    ids, at = host if host is not None else (input_ids.cpu().numpy(), rows.cpu().numpy())
    row, place = at // width, at % width
    begin, end = np.full(count, width), np.zeros(count, dtype=np.int64)
    np.minimum.at(begin, row, place + 1)
    np.maximum.at(end, row, place + 1)
    first: dict[bytes, int] = {}
    group = np.zeros(count, dtype=np.int64)
    scored = np.flatnonzero(end)
    for b in scored:
        group[b] = first.setdefault(ids[b, : begin[b]].tobytes(), len(first))
    if len(first) == len(scored):
        return None
    prompt_of = [int(scored[np.flatnonzero(group[scored] == u)[0]]) for u in range(len(first))]
    on = np.flatnonzero(end > begin)
    as_tensor = torch.from_numpy
    return SharedPrompts(prompt_of, *map(as_tensor, (group[on], on, begin, end, group, row, place)))


def read_once(model: nn.Module, input_ids: Tensor, plan: SharedPrompts) -> Tensor:
    """`hidden_at_rows` by way of `plan`. All indices are found on the host and sent together."""
    width = input_ids.shape[1]
    cache = DynamicCache(config=unwrap(model).config)
    more = plan.end[plan.row] - plan.begin[plan.row]
    step = torch.arange(int(more.max()) if len(more) else 0)
    number = torch.zeros(len(input_ids), dtype=torch.int64).index_put((plan.row,), torch.arange(len(plan.row)))
    offset = plan.place - (plan.begin[plan.of_token] - 1)  # 0: the prompt's own last token, k: the k-th behind it
    prompt_row, prompt_place, mask = _left(plan)
    on_host = (
        *(prompt_row, prompt_place, mask, plan.group[plan.of_token], number[plan.of_token]),
        *((offset - 1).clamp(min=0), offset == 0, plan.which, plan.row, (step < more[:, None]).long()),
        (plan.begin[plan.row, None] + step).clamp(max=width - 1),
    )
    sent = sent_together(on_host, input_ids.device)
    prompt_row, prompt_place, mask, group, at_row, at_place, is_first, which, row, real, source = sent
    positions = mask.cumsum(1).sub(1).clamp(min=0)
    of_prompts = _run(model, input_ids[prompt_row, prompt_place], mask, positions, cache)
    hidden = of_prompts[group, -1]
    if not len(plan.row):
        return hidden
    cache.batch_select_indices(which)
    whole = torch.cat([mask[which], real], dim=1)
    of_rest = _run(model, input_ids[row[:, None], source], whole, source, cache)
    return torch.where(is_first[:, None], hidden, of_rest[at_row, at_place])


def _left(plan: SharedPrompts) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct prompts padded on the left, `[U, P]`: row and place in the batch, and what is no padding.

    What follows them is then next to them, as sliding windows count.
    """
    lengths = plan.begin[plan.prompt_of]
    width = int(lengths.max())
    place = torch.arange(width) - (width - lengths)[:, None]
    row = torch.tensor(plan.prompt_of)[:, None].expand_as(place)
    return row, place.clamp(min=0), (place >= 0).long()


def _run(model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
    options = {"position_ids": positions, cache_argument(model): cache, "use_cache": True}
    return run_with_hidden(model, ids, mask, all_logits=False, **options)[0]


def _allowed(model: nn.Module) -> bool:
    """Is this a bare model whose pass may be cut in two: no wrapper, a cache (checkpointing has none), no dropout?"""
    inner = unwrap(model)
    if model is not inner or not isinstance(inner, PreTrainedModel) or is_compiled(model, inner):
        return False
    if any("FSDP" in cls.__name__ for cls in type(inner).__mro__) or len(getattr(inner, "hf_device_map", ())) > 1:
        return False
    if any(getattr(m, "gradient_checkpointing", False) for m in inner.modules()) or _drops_out(inner):
        return False
    known = inspect.signature(type(inner).forward).parameters
    return {"position_ids", cache_argument(inner), "use_cache"} <= set(known)


def _drops_out(model: PreTrainedModel) -> bool:
    """Would the generations of one prompt see other dropout in it?"""
    return model.training and any(True for _ in dropouts(model))


def _agrees(model: nn.Module) -> bool:
    """Does reading a prompt once give this model's own hidden states? Tried once, on a few tokens."""
    if model not in _known:
        try:
            _known[model] = _has_known_cache(model) and _same_on_a_few_tokens(model)
        except (TypeError, ValueError, NotImplementedError, RuntimeError, AttributeError, KeyError):
            _known[model] = False  # the plain pass is always right
    return _known[model]


def _has_known_cache(model: Any) -> bool:
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


@torch.no_grad()
def _same_on_a_few_tokens(model: Any) -> bool:
    embedding = model.get_input_embeddings().weight
    ids = (torch.arange(32).reshape(4, 8) + 2) % len(embedding)
    ids[1, :3], ids[3, :5] = ids[0, :3], ids[2, :5]  # two prompts of 3 and 5 tokens
    rows = torch.cat([torch.arange(2, 7), torch.arange(10, 14), torch.arange(20, 23), torch.arange(28, 31)])
    plan = find_shared_prompts(ids, rows)
    ids, rows = sent_together([ids, rows], embedding.device)
    with evaluating(model):
        plain = last_hidden(model, ids, torch.ones_like(ids)).flatten(0, 1)[rows]
        assert plan is not None
        once = read_once(model, ids, plan)
    rounding = max(torch.finfo(plain.dtype).eps, torch.finfo(torch.float32).eps)  # softmax is float32 in float64 too
    return plain.shape == once.shape and bool((plain - once).abs().max() <= 32 * rounding * plain.abs().max())
