"""Generated Unicode through every ordered pair of tokenizer kinds: mass is conserved, nothing is infinite."""

from __future__ import annotations

import itertools

import pytest
import support.tokenizers_zoo as zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from support.conserved import TEXTS, check_masses
from support.scored import Scored


@pytest.mark.parametrize(("student", "teacher"), list(itertools.permutations(zoo.ALL, 2)))
@settings(max_examples=6)
@given(text=TEXTS, seed=st.integers(0, 99), spread=st.sampled_from([0.5, 3.0, 12.0]))
def test_masses_are_conserved_on_generated_text(
    student: str, teacher: str, text: str, seed: int, spread: float
) -> None:
    check_masses(Scored.of(student, teacher, [text], seed=seed, spread=spread))


def test_a_byte_that_hardly_any_token_goes_on_with_keeps_its_distribution() -> None:
    """A piece that has most of its row's mass, and longer ones with less than a running sum can tell from nothing."""
    check_masses(Scored.of("chatml", "wordpiece", ["<00ge0000"], seed=77, spread=12.0))
