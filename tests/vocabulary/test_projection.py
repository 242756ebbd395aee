"""W between two vocabularies: each rule by hand, the promises of a row on tokenizers of every kind, and its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import support.tokenizers_zoo as zoo
from support.hand_made import renumbered, speller, vocabulary
from support.real_assets import tokenizer as real_tokenizer

from diglot.errors import VocabularyError
from diglot.vocabulary import ByteEncoder, Projection, Vocabulary

DIGITS = vocabulary(b"1", b"2", b"3", b"4", b"5")


def row(projection: Projection, i: int) -> dict[int, float]:
    """Teacher id -> weight."""
    used = projection.ids[i] >= 0
    return dict(zip(projection.ids[i, used].tolist(), projection.weights[i, used].tolist(), strict=True))


def build(student: Vocabulary, teacher: Vocabulary, **spellings: list[bytes]) -> Projection:
    return Projection.build(student, teacher, speller(teacher, spellings))


def test_equal_bytes_weigh_one() -> None:
    projection = build(vocabulary(b"b", b"a"), vocabulary(b"a", b"x", b"b"))
    assert [row(projection, i) for i in range(2)] == [{2: 1.0}, {0: 1.0}]


def test_pieces_weigh_less_by_a_factor_of_ten() -> None:
    projection = build(vocabulary(b"12", b"123"), DIGITS)
    assert row(projection, 0) == pytest.approx({0: 0.9 / 0.99, 1: 0.09 / 0.99})
    assert row(projection, 1) == pytest.approx({0: 0.9 / 0.999, 1: 0.09 / 0.999, 2: 0.009 / 0.999})


def test_of_more_than_four_pieces_the_first_four_count() -> None:
    projection = row(build(vocabulary(b"12345"), DIGITS), 0)
    assert projection == pytest.approx({i: 0.9 * 0.1**i / 0.9999 for i in range(4)}, rel=1e-5)


def test_equal_pieces_are_added_up_and_rows_are_heaviest_first() -> None:
    projection = build(vocabulary(b"1221"), DIGITS)
    assert row(projection, 0) == pytest.approx({0: 0.9009 / 0.9999, 1: 0.099 / 0.9999})
    assert projection.ids[0].tolist() == [0, 1, -1, -1]
    assert projection.weights[0, 2:].tolist() == [0.0, 0.0]


def test_text_is_cut_as_the_teacher_cuts_it() -> None:
    """Not greedily: the longest teacher token at the start would be `ab`."""
    projection = build(vocabulary(b"abc"), vocabulary(b"a", b"ab", b"bc", b"c"), abc=[b"a", b"bc"])
    assert list(row(projection, 0)) == [0, 2]


def test_a_piece_of_a_character_is_cut_into_the_longest_tokens() -> None:
    student = vocabulary(b"\xf0\x9f\x98", b"\xf0\x9f", b"a\xf0", b"\xff")
    teacher = vocabulary(b"\xf0", b"\xf0\x9f", b"\x98", b"a")
    projection = build(student, teacher)
    assert [list(row(projection, i)) for i in range(4)] == [[1, 2], [1], [3, 0], []]


def test_a_tokenizer_that_changes_the_text_is_not_believed() -> None:
    """It reads `AB` as `ab`; by its bytes the token is `A`, `B`. What it cannot write at all has an empty row."""
    teacher = vocabulary(b"ab", b"A", b"B")
    projection = Projection.build(vocabulary(b"AB", b"Ab"), teacher, speller(teacher, {"AB": [b"ab"], "Ab": [b"ab"]}))
    assert [list(row(projection, i)) for i in range(2)] == [[1, 2], []]


def test_of_equal_teacher_tokens_the_one_that_it_writes_is_meant() -> None:
    teacher = vocabulary(b"a", b"x", b"a")

    def spell(texts: Sequence[bytes]) -> list[list[int] | None]:
        return [[2 if t == b"a" else 1] for t in texts]

    assert row(Projection.build(vocabulary(b"x", b"a"), teacher, spell), 1) == {2: 1.0}


def test_control_tokens_are_matched_by_name_or_role_never_by_likeness() -> None:
    student = vocabulary(b"a", "<s>", "<|im_start|>", "<|im_end|>", "<pad>", "")
    teacher = vocabulary("<|im_end|>", b"a", b"<s>", "<s>", "<eos>", "[PAD]")
    spell = speller(teacher)
    projection = Projection.build(student, teacher, spell)
    assert [row(projection, i) for i in range(6)] == [{1: 1.0}, {3: 1.0}, {}, {0: 1.0}, {}, {}]
    roles = [([3], [4, 0]), ([4], [5]), ([0], [5])]
    projection = Projection.build(student, teacher, spell, roles=roles)
    assert row(projection, 3) == {0: 0.5, 4: 0.5}
    assert row(projection, 4) == {5: 1.0}
    assert row(projection, 0) == {1: 1.0}, "a token of text has its bytes"


def test_the_reverse_pass_gives_the_last_slot_to_the_shortest_token_without_preimage() -> None:
    student, teacher = vocabulary(b"1", b"2", b"3"), vocabulary(b"1", b"2", b"123", b"12", b"3")
    spell_t = speller(teacher)
    assert row(Projection.build(student, teacher, spell_t), 0) == {0: 1.0}
    projection = Projection.build(student, teacher, spell_t, reverse=True, spell_s=speller(student))
    assert row(projection, 0) == pytest.approx({0: 0.8, 3: 0.2})
    assert row(projection, 1) == {1: 1.0}
    with pytest.raises(VocabularyError, match="pass spell_s"):
        Projection.build(student, teacher, spell_t, reverse=True)


def test_a_full_row_gives_its_fourth_piece_up_in_the_reverse_pass() -> None:
    student, teacher = vocabulary(b"1234", b"5"), vocabulary(b"1", b"2", b"3", b"4", b"5", b"12345")
    spelt = speller(student, {"12345": [b"1234", b"5"], "1": [], "2": [], "3": [], "4": []})
    projection = row(Projection.build(student, teacher, speller(teacher), reverse=True, spell_s=spelt), 0)
    assert projection == pytest.approx({0: 0.72 / 0.999, 1: 0.072 / 0.999, 2: 0.0072 / 0.999, 5: 0.2})


def test_numbering_does_not_matter() -> None:
    student = vocabulary(b"12", b"1", b"a", b"\xf0\x9f", "<s>", b"")
    teacher = vocabulary(b"1", b"2", b"12x", b"\xf0", b"\x9f", "<s>", b"a")
    options = dict(reverse=True, spell_s=speller(student))
    dense = np.zeros((6, 7))
    projection = Projection.build(student, teacher, speller(teacher), **options)
    rows, columns, weights = projection.entries()
    dense[rows, columns] = weights
    order_s, order_t = [3, 5, 0, 4, 2, 1], [6, 2, 4, 0, 5, 3, 1]
    other_s, other_t = renumbered(student, order_s), renumbered(teacher, order_t)
    again = np.zeros((6, 7))
    projection = Projection.build(other_s, other_t, speller(other_t), reverse=True, spell_s=speller(other_s))
    rows, columns, weights = projection.entries()
    again[rows, columns] = weights
    np.testing.assert_array_equal(again, dense[np.ix_(order_s, order_t)])


@lru_cache
def side(name: str) -> tuple[Vocabulary, ByteEncoder]:
    vocab = Vocabulary.from_tokenizer(zoo.ALL[name]())
    return vocab, ByteEncoder(zoo.ALL[name](), vocab)


@pytest.mark.parametrize("teacher", sorted(zoo.ALL))
@pytest.mark.parametrize("student", sorted(zoo.ALL))
def test_each_row_is_a_distribution_whose_largest_part_begins_the_token(student: str, teacher: str) -> None:
    (vocab_s, _), (vocab_t, encoder_t) = side(student), side(teacher)
    tokens = Projection.build(vocab_s, vocab_t, encoder_t.spell)
    used = (tokens.ids >= 0).any(1)
    assert np.abs(tokens.weights[used].sum(1, dtype=np.float64) - 1).max() < 1e-6
    assert (np.diff(tokens.weights, axis=1) <= 0).all()
    writable = {vocab_t.token(i) for i in range(len(vocab_t))} - {b""}
    for i in np.flatnonzero(~vocab_s.control & (vocab_s.lengths > 0)).tolist():
        raw = vocab_s.token(i)
        if not used[i]:
            assert any(bytes([b]) not in writable for b in raw), raw
        elif raw in writable:
            assert vocab_t.token(tokens.ids[i, 0]) == raw and tokens.weights[i, 0] == 1
        else:
            assert raw.startswith(vocab_t.token(tokens.ids[i, 0])) and tokens.weights[i, 0] >= 0.9
            assert all(vocab_t.token(j) in raw for j in tokens.ids[i][tokens.ids[i] >= 0])
    for i in np.flatnonzero(vocab_s.control).tolist():
        names = {vocab_t.names[j] for j in tokens.ids[i][tokens.ids[i] >= 0].tolist()}
        assert names <= {vocab_s.names.get(i)}


def test_equal_tables_give_the_identity() -> None:
    vocab, encoder_t = side("turns")
    padded = Vocabulary.from_tokenizer(zoo.turns(), len(vocab) + 7)
    for student, teacher in ((vocab, vocab), (vocab, padded), (padded, vocab)):
        tokens = Projection.build(student, teacher, encoder_t.spell)
        rows, columns, weights = tokens.entries()
        assert rows.tolist() == columns.tolist() == list(range(len(vocab)))
        assert (weights == 1).all()


STUDENT, TEACHER = vocabulary(b"12", b"1", "<s>"), vocabulary(b"2", b"1", b"3", "<s>")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    Projection.build(STUDENT, TEACHER, speller(TEACHER), roles=[([2], [3])]).save(tmp_path / "w")
    return tmp_path / "w"


def test_what_is_saved_is_loaded(saved: Path) -> None:
    made = Projection.build(STUDENT, TEACHER, speller(TEACHER), roles=[([2], [3])])
    projection = Projection.load(saved, STUDENT, TEACHER)
    np.testing.assert_array_equal(projection.ids, made.ids)
    np.testing.assert_array_equal(projection.weights, made.weights)
    assert (projection.ids.dtype, projection.weights.dtype, projection.size_t) == (np.int64, np.float32, 4)
    assert (
        projection.rules
        == made.rules
        == {"slots": 4, "first": 0.9, "decay": 0.1, "reverse": None, "roles": [[[2], [3]]]}
    )
    record = json.loads((saved / "projection.json").read_text())
    assert (record["student"], record["teacher"]) == (STUDENT.content_hash, TEACHER.content_hash)
    assert record["shape"] == [3, 4]


def test_padding_rows_may_differ_from_when_it_was_saved(saved: Path) -> None:
    student = vocabulary(b"12", b"1", "<s>", "", "")
    teacher = vocabulary(b"2", b"1", b"3", "<s>", "")
    projection = Projection.load(saved, student, teacher)
    assert projection.ids.shape == (5, 4) and projection.size_t == 5
    assert (projection.ids[3:] == -1).all()


def test_another_pair_is_refused_and_both_hashes_are_named(saved: Path) -> None:
    other = vocabulary(b"12", b"1", b"x")
    with pytest.raises(VocabularyError, match=f"another student.*{STUDENT.content_hash}.*{other.content_hash}"):
        Projection.load(saved, other, TEACHER)
    with pytest.raises(VocabularyError, match=f"another teacher.*{TEACHER.content_hash}.*{other.content_hash}"):
        Projection.load(saved, STUDENT, other)


def test_damaged_files_are_refused(saved: Path) -> None:
    arrays, record = saved / "projection.safetensors", saved / "projection.json"
    raw, text = arrays.read_bytes(), record.read_text()

    def refused(message: str) -> None:
        with pytest.raises(VocabularyError, match=message):
            Projection.load(saved, STUDENT, TEACHER)
        arrays.write_bytes(raw)
        record.write_text(text)

    for broken in (raw[:-1], raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:], b""):
        arrays.write_bytes(broken)
        refused("is damaged: its SHA-256 is")
    record.write_text(text[:-5])
    refused("projection.json is damaged")
    record.write_text("[]")
    refused("has format 'list', this version reads 1")
    record.write_text(text.replace('"format": 1', '"format": 2'))
    refused("has format 2, this version reads 1")
    record.write_text(text.replace('"shape"', '"shap"'))
    refused("is damaged .'shape'.: build and save it anew")
    record.unlink()
    refused("No projection can be read from .*projection.json")


def test_arrays_that_are_no_projection_are_refused(saved: Path) -> None:
    """A file whose record vouches for it is looked into as well."""
    good = Projection.load(saved, STUDENT, TEACHER)

    def refused(message: str, ids: np.ndarray = good.ids, weights: np.ndarray = good.weights) -> None:
        raw = safetensors.numpy.save({"ids": np.ascontiguousarray(ids), "weights": np.ascontiguousarray(weights)})
        record = json.loads((saved / "projection.json").read_text())
        record["sha256"] = hashlib.sha256(raw).hexdigest()
        (saved / "projection.json").write_text(json.dumps(record))
        (saved / "projection.safetensors").write_bytes(raw)
        with pytest.raises(VocabularyError, match=message):
            Projection.load(saved, STUDENT, TEACHER)

    refused("a row sums to 0.5", weights=good.weights / 2)
    refused("its ids go from -1 to 4", ids=np.where(good.ids == 3, 4, good.ids))
    refused("expected int64 and float32", ids=good.ids.astype(np.int32))
    refused("expected .V_s, 4. twice", weights=good.weights[:, :3])
    refused("not finite", weights=np.where(good.weights == 1, np.nan, good.weights).astype(np.float32))


@pytest.mark.real
@pytest.mark.parametrize(("student", "teacher"), [("llama3", "qwen3"), ("smollm2", "gemma3")])
def test_real_numerals_begin_with_their_first_digit(student: str, teacher: str) -> None:
    """These teachers write one digit at a time: no numeral of two or three digits is a token of theirs."""
    (vocab_s, vocab_t) = (Vocabulary.from_tokenizer(real_tokenizer(name)) for name in (student, teacher))
    projection = Projection.build(vocab_s, vocab_t, ByteEncoder(real_tokenizer(teacher), vocab_t).spell)
    for i in range(len(vocab_s)):
        raw = vocab_s.token(i)
        if raw.isdigit():
            assert vocab_t.token(projection.ids[i, 0]) == raw[:1]
    assert (projection.ids[vocab_s.lengths > 0, 0] >= 0).all(), "both teachers can write every byte"
