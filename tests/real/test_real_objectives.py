"""Objectives on real tokenizers of up to 262,144 pieces and generated Unicode, in both directions of each pair."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import scored
from support.conserved import TEXTS, check_masses
from support.real_assets import TOKENIZERS, tokenizer

from diglot.rendering import Renderer


def _renderer(name: str) -> Renderer:
    return Renderer(tokenizer(name), name=name)


@pytest.mark.real
@pytest.mark.parametrize(("student", "teacher"), list(itertools.permutations(TOKENIZERS[:3], 2)))
def test_masses_are_conserved_on_real_tokenizers(student: str, teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scored, "renderer", scored.lru_cache(_renderer))
    monkeypatch.setattr(scored, "pair", scored.lru_cache(scored.pair.__wrapped__))

    @settings(max_examples=2)
    @given(text=TEXTS, seed=st.integers(0, 99))
    @example(text="def f(x):\n        return 12345 * x  # naïve café 数学\n", seed=1)
    def check(text: str, seed: int) -> None:
        check_masses(scored.Scored.of(student, teacher, [text], seed=seed, dtype=torch.float32))

    check()
