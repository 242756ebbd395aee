"""Sampling: the model's own distribution, ids as they are, and a defined end."""

from __future__ import annotations

import numpy as np
import pytest
import support.tokenizers_zoo as zoo
import torch
from support import tiny
from transformers import GenerationConfig, TopPLogitsWarper

from diglot.rollouts import TransformersSampler, continue_prefixes
from diglot.rollouts.draws import Nucleus


def test_the_models_own_generation_config_does_not_bend_the_samples() -> None:
    """A repetition penalty or a top-k in the model's files would make the samples somebody else's."""
    model = tiny.tiny_model(zoo.chatml())
    sampler = TransformersSampler((2,), 2)
    plain = sampler(model, [np.array([5, 6, 7])] * 8, max_new_tokens=6, seed=0)
    model.generation_config = GenerationConfig(repetition_penalty=3.0, top_k=1, temperature=0.1, do_sample=True)
    bent = sampler(model, [np.array([5, 6, 7])] * 8, max_new_tokens=6, seed=0)
    assert all(a.tolist() == b.tolist() for a, b in zip(plain, bent, strict=True))
    assert model.generation_config.repetition_penalty == 3.0


def test_padding_of_shorter_prompts_changes_nothing() -> None:
    """The distribution of the first token is the same alone and beside a longer prompt."""
    model = tiny.tiny_model(zoo.chatml())
    sampler = TransformersSampler((2,), 2)
    short, long = np.array([5, 6]), np.arange(10, 40)
    number = 3000
    beside = sampler(model, [long, *[short] * number], max_new_tokens=1, seed=1)[1:]
    with torch.no_grad():
        distribution = model(input_ids=torch.tensor([[5, 6]])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([int(i[0]) for i in beside]), minlength=len(distribution)) / number
    assert (counts - distribution).abs().sum() / 2 < 0.15


def test_a_completion_ends_with_its_stop_or_was_cut() -> None:
    model = tiny.tiny_model(zoo.chatml())
    sampler = TransformersSampler((2, 50, 60, 70, 80), 2)
    result = sampler(model, [np.array([5, 6, 7])] * 40, max_new_tokens=20, seed=0)
    for ids in result:
        assert not np.isin(ids[:-1], sampler.stop_ids).any()
        assert len(ids) == 20 or ids[-1] in sampler.stop_ids
    assert {len(i) for i in result} != {20}


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.5, 0.9, 0.999])
def test_a_nucleus_is_that_of_transformers(top_p: float) -> None:
    """Equal scores and impossible tokens among them; of even a tiny mass one token is left."""
    scores = torch.randn(16, 200, generator=torch.Generator().manual_seed(0)) * 3
    scores[3, :50], scores[4, 7:], scores[5] = 1.0, -torch.inf, 0.0
    ids = torch.zeros(16, 1, dtype=torch.long)
    result = Nucleus(top_p)(ids, scores)
    assert torch.equal(result, TopPLogitsWarper(top_p)(ids, scores))
    assert (result > -torch.inf).any(-1).all()


def test_no_prompts_no_completions() -> None:
    assert TransformersSampler((2,), 2)(tiny.tiny_model(zoo.chatml()), [], max_new_tokens=3, seed=0) == []


def test_prefixes_are_kept_and_finished_ones_left_alone() -> None:
    model = tiny.tiny_model(zoo.chatml())
    sampler = TransformersSampler((2,), 2)
    prefixes = [np.array([9, 9]), np.array([], dtype=np.int64), np.array([9, 2])]
    result = continue_prefixes(sampler, model, [np.array([5])] * 3, prefixes, max_new_tokens=4, seed=0)
    assert result[0][:2].tolist() == [9, 9] and len(result[0]) <= 4
    assert result[2].tolist() == [9, 2]
