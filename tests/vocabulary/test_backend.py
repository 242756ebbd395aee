"""Private copies of a tokenizer: sharing the user's model changes nothing that comes out."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import support.tokenizers_zoo as zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from support.real_assets import TOKENIZERS
from support.real_assets import tokenizer as real_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from diglot.vocabulary import ByteEncoder, Vocabulary, backend

Copies = tuple[ByteEncoder, ByteEncoder]


def both(tokenizer: PreTrainedTokenizerBase) -> Copies:
    """Encoders around the tokenizer's own model, and around a copy of it."""
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_can_share", lambda *_: False)
        copied = ByteEncoder(tokenizer, vocabulary)
    return ByteEncoder(tokenizer, vocabulary), copied


def states(encoder: ByteEncoder) -> list[str | None]:
    tokens = (encoder._encoder._inside.plain, encoder._encoder._inside.with_specials)
    return [copy and copy.to_str() for copy in tokens]


def is_shared(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Does the copy that plain text is encoded with use the tokenizer's own model?"""
    names, own = Vocabulary.from_tokenizer(tokenizer).names, tokenizer.backend_tokenizer
    return backend._can_share(own, names) and backend._never_writes(own.model, names)


def with_dropout() -> PreTrainedTokenizerFast:
    copy = Tokenizer.from_str(zoo.chatml().backend_tokenizer.to_str())
    copy.model.dropout = 0.5
    return PreTrainedTokenizerFast(tokenizer_object=copy, eos_token="<|im_end|>")


def with_added(count: int) -> PreTrainedTokenizerFast:
    """Tokens of every kind that the model has not, special and not in turns."""
    copy = Tokenizer.from_str(zoo.chatml().backend_tokenizer.to_str())
    for k in range(count):
        add = copy.add_special_tokens if k % 2 else copy.add_tokens
        add([AddedToken(f"<{k}>", single_word=k % 3 == 0, lstrip=k % 4 == 1, rstrip=k % 5 == 1, normalized=k % 7 == 0)])
    return PreTrainedTokenizerFast(tokenizer_object=copy, eos_token="<|im_end|>", extra_special_tokens=["<2>"])


@pytest.mark.parametrize("name", zoo.ALL)
def test_a_copy_around_the_users_own_model_is_one_of_the_whole_tokenizer(name: str) -> None:
    """Byte for byte what taking all of it to text and back gives."""
    shared, copied = both(zoo.ALL[name]())
    assert is_shared(zoo.ALL[name]()) == (name in ("chatml", "inst", "turns", "nfc"))
    assert states(shared) == states(copied)


@pytest.mark.parametrize("count", [1, 12, 40])
def test_added_tokens_keep_their_ids_and_flags(count: int) -> None:
    tokenizer = with_added(count)
    shared, copied = both(tokenizer)
    assert is_shared(tokenizer) == (count < 40) and states(shared) == states(copied)
    text = "a <0> b<1>c <2>d" + "".join(f" <{k}>" for k in range(count))
    assert shared.encode_markup(text).tolist() == copied.encode_markup(text).tolist()


@pytest.mark.parametrize("make", [zoo.unigram, zoo.unigram_nfkc, zoo.wordpiece, with_dropout])
def test_models_that_have_to_be_changed_are_not_shared(make: object) -> None:
    tokenizer = make() if callable(make) else None
    assert tokenizer is not None and not is_shared(tokenizer)


def test_no_dropout_gets_into_a_copy_and_none_is_taken_from_the_user() -> None:
    tokenizer = with_dropout()
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    encoder = ByteEncoder(tokenizer, vocabulary)
    text = "The river had been rising since dawn"
    assert len({tuple(encoder.encode([text])[0].ids.tolist()) for _ in range(20)}) == 1
    assert tokenizer.backend_tokenizer.model.dropout == 0.5


@st.composite
def tiny_bpe(draw: st.DrawFn) -> PreTrainedTokenizerFast:
    """A BPE of random merges over three letters, some of whose pieces are control tokens."""
    vocab = {"a": 0, "b": 1, "c": 2}
    merges: list[tuple[str, str]] = []
    for _ in range(draw(st.integers(1, 12))):
        pieces = st.sampled_from(sorted(vocab))
        pair = draw(pieces), draw(pieces)
        if pair not in merges and len("".join(pair)) <= 6:
            merges.append(pair)
            vocab.setdefault("".join(pair), len(vocab))
    control = draw(st.lists(st.sampled_from(sorted(vocab, key=len)[3:] or ["c"]), min_size=1, max_size=2, unique=True))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=draw(st.booleans())))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(control)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=control[0])


@settings(max_examples=300)
@given(tokenizer=tiny_bpe(), texts=st.lists(st.text("abc ", max_size=16), min_size=1, max_size=8))
def test_a_shared_model_writes_no_control_token_and_the_same_tokens(
    tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    """One look at a token's name tells whether merges reach it in any text."""
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    for one, other in zip(*(encoder.encode(texts) for encoder in both(tokenizer)), strict=True):
        assert np.array_equal(one.ids, other.ids) and np.array_equal(one.ends, other.ends)
        assert not vocabulary.control[one.ids].any()


@pytest.mark.parametrize(("merges", "shared"), [([("a", "b"), ("ab", "c")], False), ([("b", "c"), ("ab", "c")], True)])
def test_a_model_is_shared_if_its_merges_never_get_to_a_control_token(
    merges: list[tuple[str, str]], shared: bool
) -> None:
    """In the second the piece "ab" is there, and a merge that would make "abc" of it, but nothing makes "ab"."""
    copy = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}, merges=merges))
    copy.pre_tokenizer, copy.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    copy.add_special_tokens(["abc"])
    assert is_shared(PreTrainedTokenizerFast(tokenizer_object=copy, eos_token="abc")) == shared


@pytest.mark.real
@pytest.mark.parametrize("name", TOKENIZERS)
def test_real_tokenizers_are_shared_and_copied_whole(name: str) -> None:
    shared, copied = both(real_tokenizer(name))
    assert is_shared(real_tokenizer(name)) and states(shared) == states(copied)


def test_a_copy_from_a_pickle_still_reads_the_names_of_special_tokens_as_text() -> None:
    """The library does not pickle the switch that hides them."""
    tokenizer = zoo.chatml()
    encoder = ByteEncoder(tokenizer, Vocabulary.from_tokenizer(tokenizer))
    copied = pickle.loads(pickle.dumps(encoder))
    text = "a <|im_end|> b"
    assert copied.encode([text])[0].ids.tolist() == encoder.encode([text])[0].ids.tolist()
    assert not copied.vocabulary.control[copied.encode([text])[0].ids].any()
    assert copied.encode_markup(text).tolist() == encoder.encode_markup(text).tolist()
