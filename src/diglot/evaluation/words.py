"""The word that a model would write next, wherever its own tokens cut it."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from transformers import PreTrainedModel

from diglot.arrays import Ints
from diglot.data import Sample
from diglot.rendering import Renderer
from diglot.rollouts import TransformersSampler

_BOUNDARY = re.compile(r"(?<=\S)(?=\s+\S)")
WORD_TOKENS = 8  # tokens in which a word has to be written; a longer one counts as far as it came


def places(text: str, number: int, seed: str) -> list[int]:
    """Up to `number` character offsets at which a word ends and another one follows, drawn by `seed`, ascending."""
    boundaries = [match.start() for match in _BOUNDARY.finditer(text)]
    return sorted(random.Random(seed).sample(boundaries, min(number, len(boundaries))))


def first_word(text: str) -> str:
    """The first word of a continuation, without the white space around it; empty if none begins."""
    words = text.split(maxsplit=1)
    return words[0] if words else ""


def next_words(
    model: PreTrainedModel,
    renderer: Renderer,
    prefixes: Sequence[tuple[Sample, int]],
    *,
    max_length: int | None,
    batch_size: int,
) -> list[str | None]:
    """The greedy next word after the first `k` characters of each sample's reply; None where the text is too long."""
    prompts = [_prefix(renderer, sample, k, max_length) for sample, k in prefixes]
    fitting = [p for p in prompts if p is not None]
    greedy = TransformersSampler(renderer.stop_ids, renderer.stop_id, top_k=1)
    words: list[str] = []
    for start in range(0, len(fitting), batch_size):
        batch = fitting[start : start + batch_size]
        for ids in greedy(model, batch, max_new_tokens=WORD_TOKENS, seed=0):
            words.append(first_word(renderer.vocabulary.bytes_of(ids).decode("utf-8", "ignore")))
    answers = iter(words)
    return [None if p is None else next(answers) for p in prompts]


def _prefix(renderer: Renderer, sample: Sample, k: int, max_length: int | None) -> Ints | None:
    ids = renderer.render(sample.conversation, str(sample.reply)[:k], stopped=False).ids
    return None if max_length is not None and len(ids) + WORD_TOKENS > max_length else ids
