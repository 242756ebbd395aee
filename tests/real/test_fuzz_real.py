"""Twenty thousand texts over ninety ordered pairs of real tokenizers; tests/nightly has a million."""

from __future__ import annotations

import itertools
import random
from functools import lru_cache

import pytest
from support.fuzzing import fuzz_ids, fuzz_text, specials
from support.pairing import check_pair, check_sampled
from support.real_assets import TOKENIZERS, tokenizer
from support.texts import HARD

from diglot.rendering import Renderer

pytestmark = pytest.mark.real

PAIRS = list(itertools.permutations(TOKENIZERS, 2))
TEXTS = 224  # a pair, half of them as sampled ids


@lru_cache
def renderer(name: str) -> Renderer:
    return Renderer(tokenizer(name), name=name)


@pytest.mark.parametrize("student", TOKENIZERS)
def test_real_tokenizers_align_without_a_silent_error(student: str) -> None:
    assert len(PAIRS) >= 20 and len(PAIRS) * TEXTS >= 20_000
    for teacher in (t for s, t in PAIRS if s == student):
        sides = renderer(student), renderer(teacher)
        draw, special = random.Random(f"real/{student}/{teacher}"), specials(*sides)
        check_pair(*sides, HARD)
        check_pair(*sides, [fuzz_text(draw, special) for _ in range(TEXTS // 2)])
        check_sampled(*sides, [fuzz_ids(draw, sides[0], special) for _ in range(TEXTS // 2)])
