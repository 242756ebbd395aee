"""A tokenizer that is loaded as something else than its own tokenizer.json says is named, and no other one is."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from diglot.rendering import Renderer
from diglot.vocabulary.own_file import TEXTS, difference_from_file

DIGITS_APART = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)


def folder_of(path: Path, tokenizer_class: str) -> Path:
    """A byte-level tokenizer that merges "12" and whose file cuts every digit apart first."""
    vocabulary = {piece: i for i, piece in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "<eos>"])}
    backend = Tokenizer(models.BPE(vocabulary, [("1", "2")]))
    backend.pre_tokenizer, backend.decoder = DIGITS_APART, decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": tokenizer_class}))
    return path


def warnings_of(tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture) -> list[str]:
    with caplog.at_level(logging.WARNING, "diglot"):
        Renderer(tokenizer, name="teacher")
    return [text for text in caplog.messages if "tokenizer.json" in text]


def test_a_class_that_rebuilds_the_file_is_named_with_text_and_both_encodings(tmp_path, caplog):
    tokenizer = AutoTokenizer.from_pretrained(folder_of(tmp_path, "GPT2Tokenizer"))
    stated = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = next(t for t in TEXTS if "12" in t)
    expected = stated.encode(text).ids, tokenizer(text, add_special_tokens=False)["input_ids"]
    assert expected[0] != expected[1]
    (message,) = warnings_of(tokenizer, caplog)
    assert message.startswith("teacher: ")
    for part in (repr(text), *map(str, expected), "TokenizersBackend", str(tmp_path)):
        assert part in message


def test_the_advice_of_the_message_reads_the_file_as_it_is(tmp_path, caplog):
    folder_of(tmp_path, "GPT2Tokenizer")
    assert warnings_of(PreTrainedTokenizerFast.from_pretrained(tmp_path), caplog) == []
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace("GPT2Tokenizer", "TokenizersBackend"))
    assert warnings_of(AutoTokenizer.from_pretrained(tmp_path), caplog) == []


def test_padding_that_the_file_states_is_no_difference(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder_of(tmp_path, "TokenizersBackend"))
    stated = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    stated.enable_padding(length=128, pad_id=0)
    stated.enable_truncation(3)
    stated.save(str(tmp_path / "tokenizer.json"))
    assert difference_from_file(tokenizer) is None


@pytest.mark.parametrize("place", ["", "no/such-name-anywhere"])
def test_a_tokenizer_without_a_file_is_compared_with_nothing(tmp_path, place):
    tokenizer = AutoTokenizer.from_pretrained(folder_of(tmp_path, "GPT2Tokenizer"))
    tokenizer.name_or_path = place
    assert difference_from_file(tokenizer) is None
