"""Tokenizers by name are loaded so that their bytes can be read, and as their file says where that is asked for."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
from datasets import Dataset
from support import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from diglot.errors import ConfigError
from diglot.options import GKDConfig
from diglot.rendering import Renderer
from diglot.trainers import GKDTrainer
from diglot.vocabulary import Vocabulary, load_tokenizer
from diglot.vocabulary.kinds import byte_alphabet

TEXTS = ("hello naïve 数学 🙂\n\ttab", "", "</s> a <extra_id_0>b", "a</s> \n b")


class Foreign(PreTrainedTokenizer):
    """A Python class that the library picks beside a tokenizer.json, as Mistral's own beside vLLM."""

    @property
    def vocab_size(self) -> int:
        return 1

    def get_vocab(self) -> dict[str, int]:
        return {"x": 0}

    def _tokenize(self, text: str) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return 0


def test_a_tokenizer_of_bytes_is_the_same_on_the_library_that_can_be_read(tmp_path: Path) -> None:
    python = ByT5Tokenizer()
    python.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert [tokenizer(text)["input_ids"] for text in TEXTS] == [python(text)["input_ids"] for text in TEXTS]
    assert len(tokenizer) == len(python) and tokenizer.special_tokens_map == python.special_tokens_map
    table = Vocabulary.from_tokenizer(tokenizer)
    assert [table.token(i) for i in python("é", add_special_tokens=False)["input_ids"]] == [b"\xc3", b"\xa9"]
    read = Renderer(tokenizer).encoder.encode([TEXTS[0]])[0]
    assert read.exact.all() and read.ends.tolist() == list(range(1, len(TEXTS[0].encode()) + 1))


def test_where_the_library_picks_a_class_of_its_own_the_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.chatml().save_pretrained(tmp_path)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: Foreign())
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer("Hi")["input_ids"] == zoo.chatml()("Hi")["input_ids"]
    assert tokenizer.chat_template == zoo.chatml().chat_template
    assert isinstance(load_tokenizer(str(tmp_path / "nothing here")), Foreign)


@pytest.mark.parametrize("special", [["</s>", "<unk>"], ["</s>"]])
def test_a_file_whose_rebuilding_loses_text_is_read_as_it_is(
    special: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As DeepSeek V3's, a byte-level file that declares a class of SentencePiece's form, in transformers 5.4. The
    rebuilt one loses spaces, or refuses the text where it has no unknown token."""
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*sorted(byte_alphabet()), *special])}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path)
    stated = tmp_path / "tokenizer_config.json"
    stated.write_text(json.dumps({**json.loads(stated.read_text()), "tokenizer_class": "CodeLlamaTokenizer"}))
    named = load_tokenizer(str(tmp_path), {"tokenizer_class": "CodeLlamaTokenizer"})  # asked for by name: not replaced
    assert type(named).__name__ == "CodeLlamaTokenizer" and not caplog.messages
    text = "hello world 12"
    with suppress(Exception):
        assert named.decode(named.encode(text, add_special_tokens=False)) != text
    assert load_tokenizer(str(tmp_path)).encode(text, add_special_tokens=False) == backend.encode(text).ids
    assert "CodeLlamaTokenizer, which loses text" in caplog.text


def test_a_run_can_name_the_class_or_other_arguments_for_each_side(tmp_path: Path) -> None:
    folders = {}
    for name, tokenizer in (("student", zoo.chatml()), ("teacher", zoo.inst())):
        folders[name] = tiny.save(tmp_path / name, tokenizer)
    stated = tmp_path / "student" / "tokenizer_config.json"
    stated.write_text(json.dumps({**json.loads(stated.read_text()), "tokenizer_class": "GPT2Tokenizer"}))
    file = {"tokenizer_class": "TokenizersBackend"}
    assert type(load_tokenizer(folders["student"])).__name__ == "GPT2Tokenizer"

    def sides(**options: Any) -> list[Any]:
        config = GKDConfig(output_dir=str(tmp_path / "run"), use_cpu=True, lmbda=0.0, **options)
        rows = Dataset.from_list(tiny.CHAT_ROWS)
        trainer = GKDTrainer(folders["student"], folders["teacher"], config, train_dataset=rows)
        return [one.tokenizer for one in (trainer.student_renderer, trainer.comparisons[0].teacher.renderer)]

    assert type(sides()[0]).__name__ == "GPT2Tokenizer"
    student, teacher = sides(tokenizer_kwargs=file, teacher_tokenizer_kwargs='{"eos_token": "<unk>"}')
    assert type(student).__name__ == "TokenizersBackend" and teacher.eos_token == "<unk>"
    with pytest.raises(ConfigError, match="tokenizer_class='Nonesuch'"):
        load_tokenizer(folders["student"], {"tokenizer_class": "Nonesuch"})
