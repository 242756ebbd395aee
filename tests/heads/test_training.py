"""Blockwise gradients through wrapped and checkpointed models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from diglot.heads import Head, last_hidden, reduce_rows, token_logps
from diglot.objectives import Pair, make_objective

V = 31
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])


def student() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.4,
            tie_word_embeddings=True,
        )
    ).double()


def gradients(model: nn.Module, inner: LlamaForCausalLM, blockwise: bool = True) -> list[Tensor]:
    """Of a row objective plus log-probs, blockwise or on whole logits."""
    ids, text = torch.arange(V - 1), IDS.flatten()
    objective = make_objective("jsd", Pair(True, V, V, ids, ids, torch.tensor([V - 1]), torch.tensor([V - 1])))
    torch.manual_seed(1)
    teacher, hidden_t, rows = Head(nn.Linear(4, V).double()), torch.randn(10, 4, dtype=torch.float64), torch.arange(10)
    inner.zero_grad()
    if blockwise:
        hidden, head = last_hidden(model, IDS, torch.ones_like(IDS)).flatten(0, 1), Head.of(model)
        weight = torch.ones(10, dtype=torch.float64)
        loss, _ = reduce_rows(objective, hidden, head, hidden_t, teacher, rows, rows, weight, 4)
        loss = loss - token_logps(hidden, head, text, rows < 0, [V - 1], 3).sum()
    else:
        logits = model(input_ids=IDS).logits.flatten(0, 1)
        loss = objective(logits, teacher(hidden_t)).loss.sum()
        loss = loss + nn.functional.cross_entropy(logits, text, reduction="sum")
    loss.backward()
    return [p.grad.clone() for p in inner.parameters() if p.grad is not None]


def assert_same(tensors: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(tensors, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_every_parameter_gets_the_gradient_of_whole_logits() -> None:
    model = student()
    assert_same(gradients(model, model), gradients(model, model, blockwise=False))


def test_gradient_checkpointing_changes_nothing() -> None:
    model = student()
    expected = gradients(model, model, blockwise=False)
    model.gradient_checkpointing_enable()
    assert_same(gradients(model.train(), model), expected)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
def test_data_parallelism_reduces_every_gradient(one_process: None, options: dict[str, Any]) -> None:
    model = student()
    expected = gradients(model, model, blockwise=False)
    wrapped = nn.parallel.DistributedDataParallel(model, **options)
    for _ in range(2):  # an unreduced bucket of the first step would fail the second
        assert_same(gradients(wrapped, model), expected)
