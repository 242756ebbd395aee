"""The head against the logits of tiny models of several families."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from diglot.errors import ConfigError
from diglot.heads import Head, last_hidden
from diglot.heads.hidden import run_with_hidden

SMALL: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "gemma2-softcap": lambda: Gemma2Config(**SMALL, final_logit_softcapping=0.5),
    "gemma3": lambda: Gemma3TextConfig(**SMALL),
    "cohere-scale": lambda: CohereConfig(**SMALL, logit_scale=0.0625),
    "cohere2-scale": lambda: Cohere2Config(**SMALL, logit_scale=3.0),
    "granite-scaling": lambda: GraniteConfig(**SMALL, logits_scaling=8.0),
    "phi-bias": lambda: PhiConfig(**SMALL),
    "gpt2": lambda: GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.4),
}

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def tiny(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).to(dtype).eval()
    head = model.get_output_embeddings()
    if head.bias is not None:
        nn.init.normal_(head.bias)
    return model


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_head_of_last_hidden_is_the_model(family: str) -> None:
    model = tiny(family)
    head = Head.of(model)
    head.verify(model)
    own = model(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(head(last_hidden(model, IDS, MASK)), own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_last_hidden_is_after_the_final_norm_and_forms_no_logits(family: str) -> None:
    model = tiny(family)
    hidden, logits = run_with_hidden(model, IDS, MASK, all_logits=False)
    listed = model(input_ids=IDS, attention_mask=MASK, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(hidden, listed, rtol=0, atol=0)
    assert hidden.requires_grad
    assert logits.shape == (2, 0, 31)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2-softcap", "cohere-scale", "granite-scaling"])
def test_low_precision_heads_pass_and_give_float32(family: str, dtype: torch.dtype) -> None:
    model = tiny(family, dtype)
    head = Head.of(model)
    head.verify(model)
    assert head(last_hidden(model, IDS, MASK)).dtype == torch.float32
    assert Head.of(model.double())(last_hidden(model, IDS, MASK)).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        ("cohere-scale", {"scale": 1.0}),
        ("granite-scaling", {"scale": 8.0}),
        ("gemma2-softcap", {"softcap": None}),
        ("llama", {"scale": 1.1}),
        ("llama", {"softcap": 5.0}),
    ],
)
def test_verify_finds_a_scaling_that_is_not_the_models(family: str, wrong: dict[str, Any], dtype: torch.dtype) -> None:
    model = tiny(family, dtype)
    right = Head.of(model)
    options = {"scale": right.scale, "softcap": right.softcap, **wrong}
    with pytest.raises(ConfigError, match=r"largest difference .*, tolerance .*build the Head with its scale"):
        Head(right.module, **options).verify(model)


def test_verify_finds_a_head_of_another_width() -> None:
    with pytest.raises(ConfigError, match="largest difference inf"):
        Head(nn.Linear(16, 40, bias=False)).verify(tiny("llama"))


def test_verify_leaves_every_module_in_its_mode() -> None:
    model = tiny("llama").train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    Head.of(model).verify(model)
    assert [module.training for module in model.modules()] == before
    assert not any(p.grad is not None for p in model.parameters())


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="LlamaModel has no output embeddings"):
        Head.of(AutoModel.from_config(FAMILIES["llama"]()))
    with pytest.raises(ConfigError, match="LlamaModel has no decoder apart from its output head"):
        last_hidden(AutoModel.from_config(FAMILIES["llama"]()), IDS, MASK)


def test_right_padding_does_not_change_what_is_before_it() -> None:
    model = tiny("gemma3")
    padded, alone = last_hidden(model, IDS, MASK)[1, :3], last_hidden(model, IDS[1:, :3], MASK[1:, :3])[0]
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)


def test_tied_weights_are_the_heads_parameter() -> None:
    model = tiny("llama-tied")
    (weight,) = Head.of(model).parameters
    assert weight is model.get_input_embeddings().weight
    assert Head.of(model.requires_grad_(False)).parameters == ()


def test_hidden_states_of_another_precision_are_taken_in_the_heads() -> None:
    head, hidden = Head.of(tiny("llama")), torch.randn(3, 16, dtype=torch.bfloat16)
    torch.testing.assert_close(head(hidden), head(hidden.float()), rtol=0, atol=0)


def test_parameters_can_be_stood_in_for() -> None:
    model = tiny("phi-bias")
    head, hidden = Head.of(model), torch.randn(3, 16)
    weight, bias = head.parameters
    expected = hidden @ (2 * weight).T + bias + 1
    torch.testing.assert_close(head.finished(head.raw_with([2 * weight, bias + 1], hidden)), expected)


class Wrapper(nn.Module):
    """What data parallelism does: holds the model as `module` and sees its forward pass."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.module(*args, **kwargs)


def test_wrappers_see_the_forward_pass() -> None:
    model = tiny("qwen2")
    wrapped = Wrapper(model)
    torch.testing.assert_close(last_hidden(wrapped, IDS, MASK), last_hidden(model, IDS, MASK))
    assert wrapped.calls == 1
    Head.of(wrapped).verify(wrapped)


def test_no_hook_is_left_behind_even_after_an_error() -> None:
    model = tiny("llama")
    last_hidden(model, IDS, MASK)
    with contextlib.suppress(IndexError):
        last_hidden(model, IDS + 1000, MASK)
    assert not model.get_decoder()._forward_hooks


def test_a_compiled_model_gives_the_same_and_is_compiled_once() -> None:
    model = tiny("llama")
    expected = last_hidden(model, IDS, MASK)
    compilations = []

    def backend(graph: Any, inputs: Any) -> Any:
        compilations.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(last_hidden(compiled, IDS, MASK), expected)
    first = len(compilations)
    for shift in range(3):
        torch.testing.assert_close(last_hidden(compiled, IDS + shift, MASK), last_hidden(model, IDS + shift, MASK))
    assert len(compilations) == first
    Head.of(compiled).verify(compiled)


LORA_TARGETS: dict[str, dict[str, Any]] = {
    "body": {"target_modules": ["q_proj", "v_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("where", sorted(LORA_TARGETS))
def test_a_lora_model_is_its_own_head(where: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_dropout=0.0, init_lora_weights=False, **LORA_TARGETS[where])
    model = peft.get_peft_model(tiny("llama"), config)
    head = Head.of(model)
    if where == "whole head":
        nn.init.normal_(head.parameters[0])
    head.verify(model)
    assert len(head.parameters) == {"body": 0, "head": 2, "whole head": 1}[where]
    hidden = torch.randn(3, 16)
    stood_in = head.finished(head.raw_with([p.detach() for p in head.parameters], hidden))
    torch.testing.assert_close(stood_in, model.get_output_embeddings()(hidden))


def test_nested_text_configurations_are_read() -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=16, patch_size=8
    )
    text = Gemma3TextConfig(**SMALL, final_logit_softcapping=0.7)
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_index=30)
    ).eval()
    head = Head.of(model)
    assert head.softcap == 0.7
    hidden = last_hidden(model, IDS, MASK)
    own = head.module(hidden)
    assert own.shape == (2, 5, 31)
