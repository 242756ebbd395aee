"""What tokenizers would write is found out with few questions, and the answers are those of all of them."""

from __future__ import annotations

import numpy as np
import pytest
import support.tokenizers_zoo as zoo
import toys
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from diglot.objectives import covering_cells as module
from diglot.objectives.covering_cells import CellMap, Neighbours, Probes, Seams, forget_oldest
from diglot.rendering import Renderer

SIDES = {"chatml": zoo.chatml, "inst": zoo.inst}


def side(name: str) -> Renderer:
    return Renderer(SIDES[name](), name=name)


@pytest.mark.parametrize("name", sorted(SIDES))
def test_tokens_are_neighbours_where_their_text_is_read_as_them(name: str) -> None:
    one = side(name)
    draw, texts = np.random.default_rng(0), np.flatnonzero(one.vocabulary.lengths > 0)
    pairs = [(int(a), int(b)) for a, b in draw.choice(texts, (600, 2))]
    token, neighbours = one.vocabulary.token, Neighbours(one.vocabulary, one.encoder.spell)
    read = one.encoder.spell([token(a) + token(b) for a, b in pairs])
    expected = [ids is None or ids == list(pair) for pair, ids in zip(pairs, read, strict=True)]
    assert neighbours.allowed(pairs) == expected == neighbours.allowed(pairs)
    assert 0 < sum(expected) < len(pairs)
    short = [neighbours._cut_behind[a] and neighbours._cut_before[b] for a, b in pairs]
    assert any(short), "no pair tries the short way"


def test_a_text_that_goes_on_with_a_word_is_not_taken_for_one_that_begins_it() -> None:
    """A WordPiece tokenizer reads any text by itself as the beginning of a word; its other pieces are no text alone."""
    names = ["<stop>", "[UNK]", "c", "##c", "##a", "ca", "##b"]
    made = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    one = Renderer(PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<stop>", unk_token="[UNK]"), name="pieces")
    begins, c, a, whole, b = range(2, 7)
    assert Neighbours(one.vocabulary, one.encoder.spell).allowed([(c, a), (begins, b), (begins, a)]) == [
        True, True, False,
    ]  # fmt: skip
    teacher = Renderer(toys.bpe("c+b", "abc"), name="letters")
    cells = CellMap(one.vocabulary, teacher.vocabulary, one.encoder.spell, teacher.encoder.spell)
    assert cells.first[teacher.tokenizer.get_vocab()["cb"]] == c
    assert cells.first[teacher.tokenizer.get_vocab()["a"]] == a and whole not in cells.first
    assert Seams(cells, one.encoder.spell).begins([(c, b"a")]) == [None]


@pytest.mark.parametrize("share", [0.05, 0.5])
@pytest.mark.parametrize(("student", "teacher"), [("chatml", "inst"), ("inst", "chatml")])
def test_a_token_is_open_where_a_share_of_its_probes_changes_it(
    monkeypatch: pytest.MonkeyPatch, student: str, teacher: str, share: float
) -> None:
    monkeypatch.setattr(module, "_CHANGED", share)
    s, t = side(student), side(teacher)
    cells = CellMap(s.vocabulary, t.vocabulary, s.encoder.spell, t.encoder.spell)
    probes, piece = Probes(cells, s.encoder.spell, t.encoder.spell), t.vocabulary.token
    tokens = np.flatnonzero(t.vocabulary.lengths > 1)[::3]
    tokens, consumed = np.concatenate([tokens, tokens]), np.repeat([0, 1], len(tokens))
    cell = cells.of_leaves(tokens, consumed)
    tokens, consumed, cell = (x[cell >= 0] for x in (tokens, consumed, cell))
    cell[::4] = np.roll(cell, 1)[::4]  # seems to begin what it does not

    def is_open(token: int, done: int, expected: int) -> bool:
        whole = piece(token)
        texts = [whole + w for w in probes.probes]
        written = [w for w, ids in zip(probes.probes, t.encoder.spell(texts), strict=True)
                   if ids and [piece(i) for i in ids] == [whole, w]]  # fmt: skip
        begins = [ids[0] for ids in s.encoder.spell([whole[done:] + w for w in written]) if ids]
        changed = sum(int(cells.cell[first]) != expected for first in begins)
        return changed > share * len(begins)

    expected = [is_open(*one) for one in zip(tokens.tolist(), consumed.tolist(), cell.tolist(), strict=True)]
    assert probes.open(tokens, consumed, cell).tolist() == expected
    assert 0 < sum(expected) < len(expected)


def test_what_was_asked_first_is_forgotten_first() -> None:
    known = dict.fromkeys(range(10), True)
    forget_oldest(known, 4)
    assert list(known) == [6, 7, 8, 9]


def test_seams_answer_again_what_they_have_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    s, t = side("chatml"), side("inst")
    seams = Seams(CellMap(s.vocabulary, t.vocabulary, s.encoder.spell, t.encoder.spell), s.encoder.spell)
    pairs = [(-1, b" the"), (-1, b" river"), (-1, b" a")]
    first = seams.begins(pairs)
    seams._known.clear()
    assert seams.begins(pairs) == first
