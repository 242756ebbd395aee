"""Real teachers are asked about another reading of a text in one pass, whatever the number of threads."""

from __future__ import annotations

import pytest
import torch
from assets import fetch_model
from transformers import AutoModelForCausalLM

from diglot.heads import branches

pytestmark = pytest.mark.real


@pytest.mark.parametrize("name", ["gemma-3-270m", "smollm2-135m-instruct"])
def test_real_models_take_branches_in_one_pass(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(fetch_model(name), dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            branches._known.clear()
            assert branches._takes_trees(model)
    finally:
        torch.set_num_threads(threads)
