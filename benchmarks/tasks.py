"""What `benchmarks/sums.py` teaches, as data, and the tokenizers that cut it differently.

A task has right sentences, wrong ones that a student begins with, and pairs that are held out of its training.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

Row = tuple[str, str]


class Task(Protocol):
    """Sentences to learn; `part` is "train", "held" or "all"."""

    @property
    def name(self) -> str:
        """What it is called on the command line."""

    def row(self, draw: random.Random, part: str, right: bool = True) -> Row:
        """A prompt and its completion, right or wrong by a uniform draw."""

    def rows(self, seed: int, count: int, part: str, right: bool = True) -> list[Row]:
        """Many rows."""


def _is_held(a: int, b: int) -> bool:
    return (a * 7 + b * 13) % 10 == 0


@dataclass(frozen=True)
class Sums:
    """Two numbers and their sum, in a sentence or in code; a wrong sum is off by up to `off_by`."""

    first: tuple[int, int] = (40, 70)
    second: tuple[int, int] = (30, 50)
    off_by: int = 4
    name: str = "numbers"
    prompt: str = "{a} {thing} and {b}:"
    completion: str = " {a} plus {b} is {total}."
    things: tuple[str, ...] = ("apples", "pears", "books", "coins", "cards", "stamps")

    def row(self, draw: random.Random, part: str, right: bool = True) -> Row:
        while True:
            a, b = draw.randrange(*self.first), draw.randrange(*self.second)
            if part == "all" or _is_held(a, b) == (part == "held"):
                break
        thing = draw.choice(self.things)
        total = a + b + (0 if right else draw.randint(-self.off_by, self.off_by))
        values = {"a": a, "b": b, "thing": thing, "total": total}
        return self.prompt.format(**values), self.completion.format(**values)

    def rows(self, seed: int, count: int, part: str, right: bool = True) -> list[Row]:
        draw = random.Random(seed)
        return [self.row(draw, part, right) for _ in range(count)]


@dataclass(frozen=True)
class Words:
    """Two words and what they mean in other languages; a wrong word is a neighbour's in the list, up to `off_by` on."""

    off_by: int = 1
    name: str = "words"
    meanings: tuple[tuple[str, str], ...] = (
        ("water", "вода"), ("earth", "земля"), ("woman", "женщина"), ("word", "слово"), ("today", "आज"),
        ("house", "घर"), ("hand", "हाथ"), ("time", "समय"), ("life", "जीवन"), ("night", "रात"), ("morning", "सुबह"),
        ("town", "πόλη"), ("year", "χρόνος"), ("friend", "φίλος"), ("home", "dům"), ("place", "město"),
    )  # fmt: skip

    def row(self, draw: random.Random, part: str, right: bool = True) -> Row:
        count = len(self.meanings)
        while True:
            a, b = draw.randrange(count), draw.randrange(count)
            if part == "all" or _is_held(a, b) == (part == "held"):
                break
        off = [0 if right else draw.randint(-self.off_by, self.off_by) for _ in range(2)]
        words = [self.meanings[(i + by) % count][1] for i, by in zip((a, b), off, strict=True)]
        return f"{self.meanings[a][0]}, {self.meanings[b][0]}:", f" {words[0]}, {words[1]}."

    def rows(self, seed: int, count: int, part: str, right: bool = True) -> list[Row]:
        draw = random.Random(seed)
        return [self.row(draw, part, right) for _ in range(count)]


CODE = Sums(
    name="code",
    prompt="# {thing}: {a} and {b}\n",
    completion="def {thing}():\n    return {a} + {b}  # {total}\n",
    things=("apple_count", "book_total", "coin_sum"),
)
TASKS: dict[str, Task] = {task.name: task for task in (Sums(), Words(), CODE)}
REAL = ("qwen3", "llama3")  # the student's and the teacher's where the student is the finer one


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The canonical tokens of a text."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def made_tokenizer(task: Task, whole: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE of whole words; digits in groups of up to three, each group a token, or one by one."""
    made = Tokenizer(models.BPE())
    digits = r"\p{N}{1,3}" if whole else r"\p{N}"
    pattern = Regex(digits + r"| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=alphabet, special_tokens=["<stop>"], show_progress=False
    )
    made.train_from_iterator(texts_of(task), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<stop>", pad_token="<stop>")
    for number in {word for text in texts_of(task) for word in text.rstrip(".").split() if word.isdigit()}:
        if len(ids_of(tokenizer, number)) != (1 if whole else len(number)):
            raise ValueError(f"the tokenizer cuts {number} into {tokenizer.tokenize(number)}")
    return tokenizer


def texts_of(task: Task, count: int = 4000) -> list[str]:
    """Sentences of the task, wrong ones among them."""
    return [prompt + completion for prompt, completion in task.rows(0, count, "all", right=False)]


def real_tokenizer(task: Task, folder: Path) -> PreTrainedTokenizerFast:
    """A real byte-level BPE without what no text of the task can contain, so that tiny models can have it.

    Kept are single bytes and every token that lies inside a piece of the task's texts as the tokenizer splits them.
    Whatever can be merged in these texts still is, in the same order: they are cut as the whole tokenizer cuts them.
    """
    whole = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    backend = whole.backend_tokenizer
    texts = texts_of(task)
    pieces = {piece for text in texts for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)}
    inside = {piece[i:j] for piece in pieces for i in range(len(piece)) for j in range(i + 1, len(piece) + 1)}
    content: dict[str, Any] = json.loads(backend.to_str())
    model = content["model"]
    tokens = [token for token in model["vocab"] if token in inside or len(token) == 1]
    merges = [one if isinstance(one, list) else one.split(" ") for one in model["merges"]]
    known = set(tokens)
    model["vocab"] = {token: i for i, token in enumerate(["<stop>", *tokens])}
    model["merges"] = [pair for pair in merges if {*pair, "".join(pair)} <= known]
    stop = {"id": 0, "content": "<stop>", "special": True}
    content["added_tokens"] = [stop | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)]
    content["post_processor"] = None
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<stop>", pad_token="<stop>"
    )
    for text in texts[:200]:
        cut = whole.backend_tokenizer.encode(text, add_special_tokens=False).tokens
        if made.backend_tokenizer.encode(text, add_special_tokens=False).tokens != cut:
            raise ValueError(f"{text!r} is cut into {cut} by {folder.name}, and otherwise without its other tokens")
    return made


def cut_unlike(tokenizers: Sequence[PreTrainedTokenizerBase], texts: Sequence[str]) -> float:
    """Share of the bytes of `texts` that lie in no token that is one on both sides."""
    unlike = total = 0
    for text in texts:
        spans = []
        for tokenizer in tokenizers:
            ends = [0]
            for token in tokenizer.tokenize(text):
                ends.append(ends[-1] + len(token))  # one character of a byte-level token is one byte
            spans.append(set(itertools.pairwise(ends)))
        size = len(text.encode())
        total += size
        unlike += size - sum(end - start for start, end in spans[0] & spans[1])
    return unlike / total
