"""Small tokenizers of every kind, trained on a few lines, with chat templates of unlike styles.

Some of the library's trainers break ties differently in every process, so what they made is kept in `zoo/`.

    python tests/support/tokenizers_zoo.py      # train them anew
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ZOO = Path(__file__).with_name("zoo")

CORPUS = [
    "The river had been rising since dawn, and by noon the water was lapping at the lowest of the stone steps.",
    "Say hello to the children, who had been told to stay away from the bank. One two three, as you asked.",
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(i, add(i, 12))\n",
    "Une tasse de café naïve, s'il vous plaît. Größe, Straße, übermäßig.",
    "数学 は 楽しい です。今天天气很好，我们去公园吧。",
    "مرحبا بالعالم، كيف حالك اليوم؟ שלום עולם",
    "👩‍🚀 flies 🚀🚀 to the moon 🌕, नमस्ते दुनिया",
    "x = 1; y = 22; z = 333\r\n\tindented\n\n\n   spaces   ",
] * 4

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}{% else %}[INST] {{ m['content'] }} [/INST]"
    "{% endif %}{% endfor %}"
)
TURNS = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
THINK = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


def _stored(name: str, train: Callable[[], Tokenizer]) -> Tokenizer:
    """The tokenizer in `zoo/`, trained and put there if it is missing."""
    path = ZOO / f"{name}.json"
    if not path.exists():
        train().save(str(path), pretty=False)
    return Tokenizer.from_file(str(path))


def _wrap(backend: Tokenizer, template: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = template
    return tokenizer


def _byte_level(vocab_size: int, special: list[str], normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


@lru_cache
def chatml() -> PreTrainedTokenizerFast:
    """Byte-level BPE, ChatML template, no BOS, pad = eos."""
    backend = _byte_level(420, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return _wrap(backend, CHATML, eos_token="<|im_end|>", pad_token="<|im_end|>")


@lru_cache
def inst() -> PreTrainedTokenizerFast:
    """Another byte-level BPE, [INST] template that refuses a system role, BOS added to plain text."""
    backend = _byte_level(340, ["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrap(backend, INST, bos_token="<s>", eos_token="</s>", pad_token="<unk>")


def _train_turns() -> Tokenizer:
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    pieces = [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=[*special, *pieces], limit_alphabet=60, show_progress=False
    )
    backend.train_from_iterator([line.replace(" ", "▁") for line in CORPUS], trainer)
    return _demote(backend, pieces)


@lru_cache
def turns() -> PreTrainedTokenizerFast:
    """Gemma-like: spaces as ▁, BPE with byte fallback, BOS added, <end_of_turn> beside <eos>."""
    backend = _stored("turns", _train_turns)
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return _wrap(backend, TURNS, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def _demote(backend: Tokenizer, pieces: list[str]) -> Tokenizer:
    """Byte pieces are pieces of the model, not added tokens: the trainer knows no other way to give them ids."""
    import json

    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in set(pieces)]
    return Tokenizer.from_str(json.dumps(spec))


@lru_cache
def nfc() -> PreTrainedTokenizerFast:
    """Byte-level BPE behind an NFC normaliser, as Qwen's."""
    backend = _byte_level(380, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], normalizers.NFC())
    return _wrap(backend, CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _train_unigram() -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


@lru_cache
def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece Unigram with a dummy prefix and byte fallback, no template."""
    backend = _stored("unigram", _train_unigram)
    return _wrap(backend, None, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _train_unigram_nfkc() -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=280, special_tokens=["</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


@lru_cache
def unigram_nfkc() -> PreTrainedTokenizerFast:
    """Unigram behind NFKC and lower-casing: lossy."""
    backend = _stored("unigram_nfkc", _train_unigram_nfkc)
    return _wrap(backend, None, eos_token="</s>", unk_token="<unk>")


def _train_wordpiece() -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=320, special_tokens=["[PAD]", "[UNK]", "[SEP]"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


@lru_cache
def wordpiece() -> PreTrainedTokenizerFast:
    """WordPiece with lower-casing and accent stripping, as BERT's: whitespace is lost."""
    backend = _stored("wordpiece", _train_wordpiece)
    return _wrap(backend, None, eos_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]")


@lru_cache
def thinker() -> PreTrainedTokenizerFast:
    """The ChatML tokenizer whose template opens a think block."""
    backend = _byte_level(420, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return _wrap(backend, THINK, eos_token="<|im_end|>", pad_token="<|im_end|>")


LOSSLESS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {"chatml": chatml, "inst": inst}
LOSSY: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "turns": turns,
    "nfc": nfc,
    "unigram": unigram,
    "unigram_nfkc": unigram_nfkc,
    "wordpiece": wordpiece,
}
ALL = {**LOSSLESS, **LOSSY}


if __name__ == "__main__":
    for old in ZOO.glob("*.json"):
        old.unlink()
    for make in ALL.values():
        make()
