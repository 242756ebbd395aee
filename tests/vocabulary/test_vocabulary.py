"""Which bytes a token id stands for: exact for every kind of tokenizer, or marked, never guessed."""

from __future__ import annotations

import numpy as np
import pytest
import support.tokenizers_zoo as zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from diglot.errors import VocabularyError
from diglot.vocabulary import ByteEncoder, Encoded, Vocabulary

TRICKY = [
    "plain text",
    " leading",
    "trailing  ",
    "two  spaces",
    "\t\ttabs\n\n\nlines\r\n",
    "café cafe\u0301",
    "👩‍🚀🏳️‍🌈 flags",
    "数学は楽しい",
    "مرحبا بالعالم שלום",
    "e\u0301\u0323 combining",
    "<|im_end|> </s> <eos> as text",
    "▁ literal",
    "ﬁ ligature Å",
    "\x00\x07\x1b control",
    "0123456789 12 345",
    "\U0001d400\ue000 planes",
    "ABC Größe İ",
    "\u200b\u200d\ufeff invisible",
    "",
]
text_strategy = (
    st.lists(
        st.one_of(
            st.sampled_from(TRICKY),
            st.text(max_size=8),
            st.sampled_from([" ", "  ", "\n", "é", "한국", "🚀", "<s>", "▁"]),
        ),
        max_size=6,
    )
    .map("".join)
    .filter(lambda s: not any("\ud800" <= c <= "\udfff" for c in s))
)


def pair(name: str) -> tuple[Vocabulary, ByteEncoder]:
    tokenizer = zoo.ALL[name]()
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    return vocabulary, ByteEncoder(tokenizer, vocabulary)


PAIRS = {name: pair(name) for name in zoo.ALL}


def check(vocabulary: Vocabulary, text: str, encoded: Encoded) -> None:
    """The contract of `Encoded`, token by token."""
    raw = text.encode()
    if not len(encoded.ids):
        return
    assert encoded.ends[-1] == len(raw) and (np.diff(encoded.ends) >= 0).all() and encoded.ends[0] >= 0
    start = 0
    for i, (token, end, exact) in enumerate(zip(encoded.ids, encoded.ends, encoded.exact, strict=True)):
        spelt = vocabulary.token(token)
        if i == 0 and vocabulary.leading_space and spelt != raw[start:end]:
            spelt = spelt.removeprefix(b" ")
        if exact:
            assert spelt == raw[start:end] and not vocabulary.control[token], (text, i)
        start = end


def is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize("name", zoo.ALL)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=text_strategy)
def test_exact_tokens_spell_the_text_and_nothing_is_shifted(name: str, text: str) -> None:
    vocabulary, encoder = PAIRS[name]
    check(vocabulary, text, encoder.encode([text])[0])


@pytest.mark.parametrize("name", zoo.ALL)
@settings(max_examples=80, deadline=None, derandomize=True)
@given(texts=st.lists(st.one_of(text_strategy.map(str.encode), st.binary(max_size=6)), max_size=5))
def test_spelling_gives_ids_and_ends_of_the_texts_that_are_exact_and_no_others(name: str, texts: list[bytes]) -> None:
    vocabulary, encoder = PAIRS[name]
    for raw, ids in zip(texts, encoder.spell(texts), strict=True):
        if not is_text(raw):
            assert ids is None
            continue
        tokens = encoder.encode([raw.decode()])[0]
        dropped = bool(raw) and not len(tokens.ids)  # by the tokenizer, whole
        assert (ids is not None) == (tokens.exact.all() and not dropped)
        if ids is not None:
            assert ids == tokens.ids.tolist()
            assert vocabulary.ends_in(raw, ids).tolist() == tokens.ends.tolist()


@pytest.mark.parametrize("name", zoo.LOSSLESS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=text_strategy)
def test_byte_level_tokenizers_lose_nothing(name: str, text: str) -> None:
    vocabulary, encoder = PAIRS[name]
    tokens = encoder.encode([text])[0]
    assert tokens.exact.all() and vocabulary.bytes_of(tokens.ids) == text.encode()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=text_strategy.filter(lambda s: "▁" not in s))
def test_byte_fallback_loses_nothing_but_the_metaspace_itself(text: str) -> None:
    vocabulary, encoder = PAIRS["turns"]
    tokens = encoder.encode([text])[0]
    assert tokens.exact.all() and vocabulary.bytes_of(tokens.ids) == text.encode()


@pytest.mark.parametrize(
    ("name", "text", "lost"),
    [
        ("nfc", "cafe\u0301 x", "e\u0301"),
        ("unigram_nfkc", "one ﬁ two", "ﬁ"),
        ("turns", "one ▁ two", "▁"),
        ("wordpiece", "the café is", "café"),
    ],
)
def test_what_a_normaliser_changed_is_marked_and_the_rest_stays_exact(name: str, text: str, lost: str) -> None:
    """The unalignable region holds the changed characters; text before it keeps its boundaries."""
    tokens = PAIRS[name][1].encode([text])[0]
    low = text.encode().index(lost.encode())
    wrong = tokens.ends[~tokens.exact]
    assert len(wrong) and any(low < end for end in wrong)
    assert tokens.exact[0] and tokens.exact[-1]


def test_characters_that_a_vocabulary_cannot_write_are_not_silently_dropped() -> None:
    """A byte-level vocabulary without some byte values loses them; the tokens after them must not move up."""
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "<e>": 2}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    tokens = ByteEncoder(tokenizer, vocabulary).encode(["aXb", "XY", "ab"])
    assert (
        tokens[0].ids.tolist() == [0, 1]
        and tokens[0].ends.tolist() == [1, 3]
        and tokens[0].exact.tolist() == [True, False]
    )
    assert len(tokens[1].ids) == 0
    assert tokens[2].exact.all()


@pytest.mark.parametrize("name", zoo.ALL)
def test_special_tokens_spelt_in_a_text_are_text(name: str) -> None:
    vocabulary, encoder = PAIRS[name]
    text = "a " + " ".join(vocabulary.names.values()) + " b"
    tokens = encoder.encode([text])[0]
    special = {i for i, n in vocabulary.names.items() if "unk" not in n.lower()}
    assert not special & set(tokens.ids.tolist())


def test_markup_recognises_special_tokens_and_adds_none() -> None:
    _, encoder = PAIRS["inst"]
    ids = encoder.encode_markup("<s>[INST] hi [/INST]</s>")
    assert ids[0] == 1 and ids[-1] == 2 and (ids == 1).sum() == 1
    assert 1 not in encoder.encode_markup("hi")


def test_encoding_a_continuation_adds_no_dummy_prefix() -> None:
    vocabulary, encoder = PAIRS["unigram"]
    assert vocabulary.bytes_of(encoder.encode(["hello"])[0].ids) == b"hello"
    assert vocabulary.bytes_of(encoder.encode([" hello"])[0].ids) == b" hello"


@pytest.mark.parametrize("name", zoo.ALL)
def test_the_users_tokenizer_is_left_as_it_is(name: str) -> None:
    tokenizer = zoo.ALL[name]()
    before = tokenizer.backend_tokenizer.to_str(), tokenizer.backend_tokenizer.encode_special_tokens
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    encoder = ByteEncoder(tokenizer, vocabulary)
    encoder.encode(["hello"])
    encoder.encode_markup("hello")
    assert (tokenizer.backend_tokenizer.to_str(), tokenizer.backend_tokenizer.encode_special_tokens) == before


def test_bos_ids_are_what_the_tokenizer_puts_before_plain_text() -> None:
    assert {name: PAIRS[name][1].bos_ids for name in ("chatml", "inst", "turns")} == {
        "chatml": (),
        "inst": (1,),
        "turns": (2,),
    }


def test_a_lone_surrogate_is_an_error_that_says_where() -> None:
    with pytest.raises(VocabularyError, match="character 3"):
        PAIRS["chatml"][1].encode(["abc\ud83d"])


def test_added_tokens_stand_for_their_own_characters() -> None:
    """W17: a marker of non-ASCII characters has the bytes of its UTF-8, and ▁ in its name is no space."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(zoo.chatml().backend_tokenizer.to_str()), eos_token="<|im_end|>"
    )
    tokenizer.add_tokens(["<｜end▁of▁thought｜>"])
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    token = len(tokenizer) - 1
    assert vocabulary.token(token) == "<｜end▁of▁thought｜>".encode() and vocabulary.lengths[token] == 26
    encoder = ByteEncoder(tokenizer, vocabulary)
    assert encoder.encode(["a<｜end▁of▁thought｜>b"])[0].exact.all()


def test_padding_rows_have_no_bytes_and_do_not_make_a_difference() -> None:
    plain = Vocabulary.from_tokenizer(zoo.chatml())
    padded = Vocabulary.from_tokenizer(zoo.chatml(), num_embeddings=512)
    assert len(padded) == 512 and padded.control[420:].all() and padded.bytes_of([500]) == b""
    assert (
        plain.same_as(padded) and plain.content_hash == padded.content_hash and plain.explain_difference(padded) == ""
    )
    assert "512" in plain.padding_note(padded) and "420" in plain.padding_note(padded)


def test_equal_sizes_are_not_equal_tables() -> None:
    a, b = Vocabulary.from_tokenizer(zoo.chatml(), 600), Vocabulary.from_tokenizer(zoo.inst(), 600)
    assert len(a) == len(b) and not a.same_as(b)
    assert "other text" in a.explain_difference(b)


def test_ids_beyond_the_embedding_are_refused_unless_text_cannot_reach_them() -> None:
    with pytest.raises(VocabularyError, match=r"419.*400"):
        Vocabulary.from_tokenizer(zoo.chatml(), num_embeddings=400)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(zoo.chatml().backend_tokenizer.to_str()), eos_token="<|im_end|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    vocabulary = Vocabulary.from_tokenizer(tokenizer, num_embeddings=420)
    assert len(vocabulary) == 420 and "<image>" not in vocabulary.names.values()


@pytest.mark.parametrize("other", zoo.ALL)
def test_shared_tokens_are_byte_equal_unambiguous_text(other: str) -> None:
    a, b = PAIRS["chatml"][0], PAIRS[other][0]
    mine, theirs = a.shared(b)
    assert len(mine) > 20 and len(set(mine)) == len(mine) and len(set(theirs)) == len(theirs)
    for i, j in zip(mine, theirs, strict=True):
        assert a.token(i) == b.token(j) != b"" and not a.control[i] and not b.control[j]


def test_w20_a_space_is_a_space_however_it_is_spelt() -> None:
    """Ġthe and ▁the are the same bytes."""
    a, b = PAIRS["chatml"][0], PAIRS["unigram"][0]
    shared = {a.token(i) for i in a.shared(b)[0]}
    assert any(token.startswith(b" ") and len(token) > 1 for token in shared)


def test_duplicates_are_shared_with_nobody() -> None:
    backend = Tokenizer(
        models.BPE(vocab={"▁": 0, "a": 1, "<0x61>": 2, "b": 3, "<e>": 4}, merges=[], byte_fallback=True)
    )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    assert vocabulary.token(1) == vocabulary.token(2) == b"a"
    assert 1 not in vocabulary.shared(vocabulary)[0] and 3 in vocabulary.shared(vocabulary)[0]


def test_display_is_readable() -> None:
    vocabulary = PAIRS["chatml"][0]
    assert vocabulary.display(1) == "<|im_start|>"
    assert "\\x" in vocabulary.display(zoo.chatml().convert_tokens_to_ids("æ"))
    assert Vocabulary.from_tokenizer(zoo.chatml(), 430).display(425) == "[row 425]"


def test_a_tokenizer_of_no_known_kind_is_refused_with_what_is_supported() -> None:
    backend = Tokenizer(models.WordLevel(vocab={"hello": 0, "<u>": 1}, unk_token="<u>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.CTC()
    with pytest.raises(VocabularyError, match=r"WordLevel.*CTC.*Supported"):
        Vocabulary.from_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<u>"))
