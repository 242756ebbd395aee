"""Tokenizers whose description says more than one thing: what text reaches an id, and which bytes that id then has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import support.tokenizers_zoo as zoo
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from diglot.errors import VocabularyError
from diglot.vocabulary import ByteEncoder, Encoded, Vocabulary

ALPHABET = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def byte_level(extra: dict[str, int], **options: object) -> Tokenizer:
    backend = Tokenizer(models.BPE(vocab={**ALPHABET, **extra}, **{"merges": [], **options}))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[Vocabulary, Encoded]:
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    return vocabulary, ByteEncoder(tokenizer, vocabulary).encode([text])[0]


def spelt(tokenizer: PreTrainedTokenizerFast, text: str) -> bytes:
    """The bytes of a text whose tokens are all exact."""
    vocabulary, tokens = encode(tokenizer, text)
    assert tokens.exact.all()
    return vocabulary.bytes_of(tokens.ids)


def test_runs_of_spaces_that_are_added_tokens_too_are_spaces() -> None:
    """Gemma lists its runs of ▁ both as pieces of the model and as added tokens."""
    backend = Tokenizer(models.BPE(vocab={"▁": 0, "▁▁": 1, "a": 2, "<e>": 3}, merges=[("▁", "▁")]))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_tokens([AddedToken("▁▁", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    vocabulary, tokens = encode(tokenizer, "a  a")
    assert tokens.ids.tolist() == [2, 1, 2] and tokens.exact.all()
    assert vocabulary.bytes_of([1]) == b"  "


def test_an_added_token_outside_the_byte_alphabet_keeps_its_text() -> None:
    backend = byte_level({"a b": 256})
    backend.add_tokens(["a b"])
    assert spelt(PreTrainedTokenizerFast(tokenizer_object=backend), "xa by") == b"xa by"


def test_no_text_reaches_a_control_token_as_a_whole_word() -> None:
    backend = byte_level({"<|e|>": 256}, ignore_merges=True)
    backend.add_special_tokens(["<|e|>"])
    assert spelt(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|e|>"), "<|e|>") == b"<|e|>"


def test_no_text_reaches_a_control_token_that_the_backend_does_not_mark() -> None:
    backend = byte_level({"<|e|>": 256})
    backend.add_tokens(["<|e|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|e|>")
    assert spelt(tokenizer, "a<|e|>b") == b"a<|e|>b"
    assert 256 in ByteEncoder(tokenizer, Vocabulary.from_tokenizer(tokenizer)).encode_markup("a<|e|>b")


def test_a_pad_that_is_a_piece_of_text_stays_text_when_the_tokenizer_is_saved_and_loaded(tmp_path: Path) -> None:
    """Some name "!" their pad, and loading declares it a special token."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level({"<|e|>": 256}), eos_token="<|e|>", pad_token="!")
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.pad_token_id in loaded.added_tokens_decoder
    assert spelt(loaded, "Hello!! a!") == b"Hello!! a!"
    assert not Vocabulary.from_tokenizer(loaded).control[loaded.pad_token_id]


@pytest.mark.parametrize("text", ["a </s> b", "a \uff1c/s\uff1e b", "a </S> b"])
def test_no_text_reaches_a_control_token_through_a_normaliser(text: str) -> None:
    tokenizer = zoo.unigram_nfkc()
    _, tokens = encode(tokenizer, text)
    assert tokenizer.eos_token_id not in tokens.ids and tokens.ends[-1] == len(text.encode())


def test_encoding_is_the_same_every_time_for_a_tokenizer_with_dropout() -> None:
    backend = byte_level({"ab": 256}, merges=[("a", "b")], dropout=0.9)
    encoder_of = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert all(encode(encoder_of, "abab")[1].ids.tolist() == [256, 256] for _ in range(5))


def test_the_users_truncation_and_padding_stay_as_they_are() -> None:
    backend = byte_level({"<|e|>": 256})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|e|>", pad_token="<|e|>")
    tokenizer("hello", truncation=True, max_length=3, padding="max_length")
    before = tokenizer.backend_tokenizer.to_str()
    assert spelt(tokenizer, "hello world") == b"hello world"
    assert tokenizer.backend_tokenizer.to_str() == before


def test_punctuation_of_wordpiece_has_no_space_where_its_decoder_writes_none() -> None:
    _, tokens = encode(zoo.wordpiece(), "hello, world.")
    assert tokens.exact.all() and tokens.ends[-1] == 13


def test_the_last_word_of_a_suffix_tokenizer_has_no_space() -> None:
    vocab = {"a": 0, "b": 1, "a</w>": 2, "b</w>": 3, "<e>": 4}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], end_of_word_suffix="</w>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder(suffix="</w>")
    _, tokens = encode(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>"), "a b")
    assert tokens.ends.tolist() == [2, 3] and tokens.exact.all()


def test_words_that_each_get_their_own_mark_keep_it() -> None:
    """T5 as first converted: whitespace splits words, then each is given a ▁."""
    pieces = [("<unk>", 0.0), ("▁a", -1.0), ("▁b", -1.0), ("a", -2.0), ("b", -2.0), ("▁", -3.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    backend.decoder = decoders.Metaspace()
    _, tokens = encode(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"), "a b")
    assert tokens.ids.tolist() == [1, 2] and tokens.ends.tolist() == [1, 3] and tokens.exact.all()


def test_a_decoder_that_does_not_fit_its_pre_tokenizer_is_refused() -> None:
    description = json.loads(zoo.unigram().backend_tokenizer.to_str())
    description["decoder"] = json.loads(zoo.chatml().backend_tokenizer.to_str())["decoder"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(description)), unk_token="<unk>")
    with pytest.raises(VocabularyError, match="decoder does not undo"):
        ByteEncoder(tokenizer, Vocabulary.from_tokenizer(tokenizer))


@pytest.mark.parametrize("wrong", [-100, -1, 420])
def test_ids_outside_the_table_are_refused(wrong: int) -> None:
    vocabulary = Vocabulary.from_tokenizer(zoo.chatml())
    with pytest.raises(VocabularyError, match=str(wrong)):
        vocabulary.bytes_of([wrong])
