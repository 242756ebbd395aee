"""A million texts over real tokenizers of every kind, in both directions of each pair: no silent error."""

from __future__ import annotations

import itertools
import random

import pytest
import support.tokenizers_zoo as zoo
from support.fuzzing import fuzz_ids, fuzz_text, specials
from support.pairing import check_pair, check_sampled
from support.real_assets import TOKENIZERS, tokenizer

from diglot.rendering import Renderer

NAMES = (*TOKENIZERS, "unigram", "unigram_nfkc", "wordpiece")
PAIRS = list(itertools.permutations(NAMES, 2))
TEXTS = 6_500  # a pair, half of them as sampled ids: 156 pairs make a million
BATCH = 50


def renderer(name: str) -> Renderer:
    return Renderer(zoo.ALL[name]() if name in zoo.ALL else tokenizer(name), name=name)


@pytest.mark.nightly
@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_a_million_texts_align_without_a_silent_error(student: str, teacher: str) -> None:
    sides = renderer(student), renderer(teacher)
    draw, special, seen = random.Random(f"nightly/{student}/{teacher}"), specials(*sides), 0
    while seen < TEXTS:
        check_pair(*sides, [fuzz_text(draw, special) for _ in range(BATCH)])
        check_sampled(*sides, [fuzz_ids(draw, sides[0], special) for _ in range(BATCH)])
        seen += 2 * BATCH
    assert len(PAIRS) * TEXTS >= 1_000_000


def test_the_pairs_of_the_nightly_run_are_of_all_kinds() -> None:
    """At least twenty ordered pairs, of byte-level BPE, SentencePiece BPE, Unigram and WordPiece."""
    kinds = {Renderer(zoo.ALL[name](), name=name).vocabulary.kind for name in zoo.ALL}
    assert len(PAIRS) >= 20 and len(kinds) >= 3 and len(PAIRS) * TEXTS >= 1_000_000
