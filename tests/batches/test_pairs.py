"""Texts through two tokenizers of every pair of kinds: what counts as aligned spells the same bytes on both sides."""

from __future__ import annotations

import itertools
import random

import pytest
import support.tokenizers_zoo as zoo
from support.pairing import check_pair
from support.texts import HARD, random_text

from diglot.batches import PairReader, align_pairs
from diglot.data import to_sample
from diglot.errors import DataError
from diglot.rendering import Renderer, Role

RENDERERS = {name: Renderer(make(), name=name) for name, make in zoo.ALL.items()}
WRITABLE = [t for t in HARD if "▁" not in t]


@pytest.mark.parametrize(("student", "teacher"), list(itertools.permutations(zoo.ALL, 2)))
def test_exact_chunks_spell_the_same_bytes_on_both_sides(student: str, teacher: str) -> None:
    """42 ordered pairs, hand-picked texts and 470 random ones each: 20,000 texts without a silent error."""
    draw = random.Random(f"{student}/{teacher}")
    texts = [*HARD, *(random_text(draw) for _ in range(470))]
    for start in range(0, len(texts), 50):
        check_pair(RENDERERS[student], RENDERERS[teacher], texts[start : start + 50])


@pytest.mark.parametrize(
    ("student", "teacher"), [("chatml", "inst"), ("inst", "chatml"), ("chatml", "turns"), ("turns", "inst")]
)
@pytest.mark.parametrize("text", WRITABLE, ids=range(len(WRITABLE)))
def test_lossless_tokenizers_are_covered_completely(student: str, teacher: str, text: str) -> None:
    """Emoji with joiners, CJK, right-to-left, combining marks, CRLF, trailing spaces, special tokens as text: all."""
    covered, tokens = check_pair(RENDERERS[student], RENDERERS[teacher], [text])
    assert covered == tokens >= 1


def test_w19_a_teacher_whose_context_is_shorter_than_the_text_scores_its_beginning() -> None:
    sample = to_sample({"prompt": "Say:", "completion": " one two three four five six seven"}, "row")
    sides = RENDERERS["chatml"], RENDERERS["inst"]
    whole = PairReader(*sides, same_vocabulary=False).written(sample)
    assert whole is not None
    limit = len(whole.teacher.ids) - 8
    cut = PairReader(*sides, same_vocabulary=False, teacher_max_length=limit).written(sample)
    batch = align_pairs([cut], pad_s=0, pad_t=0, on_policy=False)
    assert len(batch.teacher.input_ids[0]) == limit and not batch.teacher.stop.any()
    assert 0 < batch.stats["covered"] < batch.stats["tokens"] and batch.stats["dropped"] > 0


def test_a_prompt_too_long_for_the_teacher_drops_the_sample_and_counts_it() -> None:
    reader = PairReader(RENDERERS["chatml"], RENDERERS["inst"], same_vocabulary=False, teacher_max_length=5)
    assert reader.written(to_sample({"prompt": "a long prompt " * 9, "completion": "x"}, "row")) is None
    assert reader.take_dropped() == {"prompt_too_long": 1} and not reader.take_dropped()


def test_roles_can_be_left_out_of_the_comparison() -> None:
    sample = to_sample({"prompt": "Say:", "completion": "<think>one two</think>three four"}, "row")
    pair = PairReader(RENDERERS["chatml"], RENDERERS["inst"], same_vocabulary=False).written(sample)
    both = align_pairs([pair], pad_s=0, pad_t=0, on_policy=False)
    less = align_pairs([pair], pad_s=0, pad_t=0, on_policy=False, unscored_roles=frozenset({Role.REASONING}))
    assert 0 < less.stats["covered"] < both.stats["covered"]
    used = less.student.role[less.alignment.pair_s.numpy()]
    assert Role.REASONING not in used and Role.CONTENT in used and Role.STOP in used


def test_w23_multi_turn_segments_align_turn_by_turn() -> None:
    row = {
        "messages": [
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "Yes, one."},
            {"role": "user", "content": "Two?"},
            {"role": "assistant", "content": "Two, naïve 数学."},
        ]
    }
    reader = PairReader(RENDERERS["chatml"], RENDERERS["inst"], same_vocabulary=False, score_turns="all")
    batch = align_pairs([reader.written(to_sample(row, "row"))] * 2, pad_s=0, pad_t=0, on_policy=False)
    assert batch.alignment.num_segments == 4 and batch.stats["covered"] == batch.stats["tokens"]
    assert batch.student.stop.sum() == batch.teacher.stop.sum() == 4


def test_no_completion_is_an_error_that_names_the_row() -> None:
    reader = PairReader(RENDERERS["chatml"], RENDERERS["inst"], same_vocabulary=False)
    with pytest.raises(DataError, match="row 7"):
        reader.written(to_sample({"prompt": "x"}, "row 7"))
