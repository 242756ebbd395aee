"""Rows that begin with the same prompt: read once, and the hidden states and gradients are those of the plain pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from diglot.heads import hidden_at_rows, last_hidden
from diglot.heads import shared_prompts as module

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
    "pad_token_id": 0,
}
WINDOWS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SMALL),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "gemma2": lambda: Gemma2Config(**SMALL, **WINDOWS),
    "gemma3": lambda: Gemma3TextConfig(**SMALL, **WINDOWS),
    "gpt2": lambda: GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=128, initializer_range=0.4),
}
# prompt and completion lengths of each row; equal letters are equal prompts. Longer and shorter than the window of 5.
ROWS = [("a", 9, 12), ("a", 9, 1), ("b", 4, 7), ("a", 9, 0), ("b", 4, 2), ("c", 14, 3), ("b", 4, 11), ("c", 14, 6)]


def tiny(family: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    return model if family == "gemma2" else model.double()  # its own masks overflow in float64


def batch(rows: list[tuple[str, int, int]] = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and scored rows, padded on the right; the completion's tokens are scored."""
    generator = torch.Generator().manual_seed(1)
    prompts = {name: torch.randint(1, 61, (length,), generator=generator) for name, length, _ in rows}
    width = max(p + c for _, p, c in rows)
    ids, mask, at = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width).long(), []
    for b, (name, p, c) in enumerate(rows):
        ids[b, : p + c] = torch.cat([prompts[name], torch.randint(1, 61, (c,), generator=generator)])
        mask[b, : p + c] = 1
        at.append(b * width + torch.arange(p - 1, p + c - 1))
    return ids, mask, torch.cat(at)


class Read:
    """Counts the tokens that go through the decoder, padding included."""

    def __init__(self, model: Any) -> None:
        self.shapes: list[tuple[int, int]] = []
        model.get_decoder().register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.shapes.append(tuple((args[0] if args else kwargs["input_ids"]).shape))

    @property
    def tokens(self) -> int:
        return sum(rows * width for rows, width in self.shapes)


def plainly(model: Any, ids: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    return last_hidden(model, ids, mask).flatten(0, 1)[rows]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_prompt_read_once_gives_the_plain_hidden_states(family: str) -> None:
    """Prompts and completions on both sides of the sliding window, empty completions and such of one token too."""
    model, (ids, mask, rows) = tiny(family), batch()
    expected = plainly(model, ids, mask, rows)
    hidden_at_rows(model, ids, mask, rows)  # the check on a few tokens has been made
    read = Read(model)
    hidden = hidden_at_rows(model, ids, mask, rows)
    assert read.shapes == [(3, 14), (6, 11)]  # three prompts; rows with more than one token behind them
    tolerance = 1e-5 if family == "gemma2" else 1e-10
    torch.testing.assert_close(hidden, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_gradient_is_that_of_the_plain_pass(family: str) -> None:
    model, (ids, mask, rows) = tiny(family), batch()
    weight = torch.randn(len(rows), 16, generator=torch.Generator().manual_seed(2))
    gradients = []
    for function in (plainly, hidden_at_rows):
        model.zero_grad()
        (function(model, ids, mask, rows) * weight).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        # Norms work in float32 inside a float64 model.
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


def test_the_window_matters_in_the_case_above() -> None:
    """The equality is not for free: without the sliding windows these hidden states are others."""
    ids, mask, rows = batch()
    wide = {**WINDOWS, "sliding_window": 100}
    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_config(Gemma3TextConfig(**SMALL, **wide)).double().eval()
    difference = plainly(other, ids, mask, rows) - plainly(tiny("gemma3"), ids, mask, rows)
    assert difference.abs().max() > 1e-2


def test_a_prompt_is_not_kept_for_a_length_at_which_positions_are_rotated_in_another_way() -> None:
    ids, mask, rows = batch()
    rope = dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)
    for longest in (16, ids.shape[1]):  # the longest prompt has 14 tokens
        torch.manual_seed(0)
        config = LlamaConfig(**{**SMALL, "max_position_embeddings": longest}, rope_parameters=rope)
        model = AutoModelForCausalLM.from_config(config).double().eval()
        with torch.no_grad():
            hidden = hidden_at_rows(model, ids, mask, rows)
            torch.testing.assert_close(hidden, plainly(model, ids, mask, rows), rtol=1e-6, atol=1e-6)
            assert module.reads_prompts_once(model, ids, rows) == (longest == ids.shape[1])


@pytest.mark.parametrize(
    "rows",
    [
        [("a", 9, 3), ("b", 9, 3), ("c", 9, 3)],  # nothing in common
        [("a", 2, 12), ("a", 2, 12)],  # little in common
        [("a", 9, 0), ("a", 9, 0)],  # nothing scored
    ],
)
def test_where_little_is_saved_the_pass_is_the_plain_one_to_the_bit(rows: list[tuple[str, int, int]]) -> None:
    model, (ids, mask, at) = tiny("llama"), batch(rows)
    assert torch.equal(hidden_at_rows(model, ids, mask, at), plainly(model, ids, mask, at))
    read = Read(model)
    hidden_at_rows(model, ids, mask, at)
    assert read.shapes == [tuple(ids.shape)]


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("why", ["wrapped", "checkpointing", "dropout", "attention dropout", "compiled"])
def test_in_doubt_the_pass_is_the_plain_one(why: str) -> None:
    """Wrappers whose hooks expect one pass, checkpointing (drops the cache), dropout (one draw per row)."""
    inner, (ids, mask, rows) = tiny("llama"), batch()
    model = inner
    if why == "wrapped":
        model = Wrapper(inner)
    elif why == "compiled":
        model = torch.compile(inner, backend="eager")
    elif why == "checkpointing":
        inner.train().gradient_checkpointing_enable()
    elif why == "attention dropout":
        inner.train().model.layers[0].self_attn.attention_dropout = 0.1
    else:
        inner.train().model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.1))
    read = Read(inner)
    assert hidden_at_rows(model, ids, mask, rows).shape == (len(rows), 16)
    assert read.shapes == [tuple(ids.shape)]


NAME = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


class OfNewerName(LlamaForCausalLM):
    """Takes its keys and values as `cache`, as models of transformers do from 5.24 on; another name is an error."""

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any = None, cache: Any = None,
                use_cache: Any = None, output_hidden_states: Any = None, return_dict: Any = None) -> Any:  # fmt: skip
        rest = dict(position_ids=position_ids, use_cache=use_cache, return_dict=return_dict)
        return super().forward(input_ids, attention_mask, **rest, **{NAME: cache})


class OfOlderName(OfNewerName):
    """The same as `past_key_values`."""

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any = None, past_key_values: Any = None,
                use_cache: Any = None, output_hidden_states: Any = None, return_dict: Any = None) -> Any:  # fmt: skip
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, use_cache)


@pytest.mark.parametrize("kind", [OfNewerName, OfOlderName])
def test_prompts_are_read_once_whatever_a_model_calls_its_cache(kind: type[LlamaForCausalLM]) -> None:
    torch.manual_seed(0)
    model, (ids, mask, rows) = kind(LlamaConfig(**SMALL)).double().eval(), batch()
    hidden_at_rows(model, ids, mask, rows)
    read = Read(model)
    hidden = hidden_at_rows(model, ids, mask, rows)
    assert read.shapes == [(3, 14), (6, 11)]
    torch.testing.assert_close(hidden, plainly(model, ids, mask, rows), rtol=1e-10, atol=1e-10)


def test_a_model_with_another_kind_of_cache_is_read_plainly() -> None:
    """A state-space model keeps no keys and values."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2, state_size=4, pad_token_id=0)
    model, (ids, mask, rows) = AutoModelForCausalLM.from_config(config).eval(), batch()
    assert torch.equal(hidden_at_rows(model, ids, mask, rows), plainly(model, ids, mask, rows))


def test_a_model_that_does_not_agree_is_found_and_read_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here: one that counts positions by itself and ignores those that it is given."""
    model, (ids, mask, rows) = tiny("gpt2"), batch()
    original = model.transformer.forward

    def deaf(*args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    monkeypatch.setattr(model.transformer, "forward", deaf)
    assert torch.equal(hidden_at_rows(model, ids, mask, rows), plainly(model, ids, mask, rows))
    assert module._known[model] is False
