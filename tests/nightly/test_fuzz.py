"""A million texts over real tokenizers of every kind, in both directions of each pair: no silent error."""

from __future__ import annotations

import itertools
import random

import pytest
import tokenizers_zoo as zoo
from pairing import check_pair
from real_assets import TOKENIZERS, tokenizer
from texts import random_text

from diglot.rendering import Renderer

NAMES = (*TOKENIZERS, "unigram", "wordpiece")
PAIRS = list(itertools.permutations(NAMES, 2))
TEXTS = 24_000  # a pair: 42 pairs make a million


def renderer(name: str) -> Renderer:
    return Renderer(zoo.ALL[name]() if name in zoo.ALL else tokenizer(name), name=name)


@pytest.mark.nightly
@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_a_million_texts_align_without_a_silent_error(student: str, teacher: str) -> None:
    sides = renderer(student), renderer(teacher)
    draw = random.Random(f"nightly/{student}/{teacher}")
    for _ in range(TEXTS // 100):
        check_pair(*sides, [random_text(draw) for _ in range(100)])
