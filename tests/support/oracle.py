"""The truth about strings for toy models: exact sums over all tokenisations, to hold objectives against.

A toy is a tokenizer of a few pieces over four letters. A distribution is a language model over its tokens, written
down as rows of probabilities in float64. Whatever a distribution says about *text* is computed here without sampling
and without a limit on beams: by a sum over every token path that spells the text, or that runs past its end.

Bytes are numbered 0 to 255 in next-byte distributions, and stop, "the text ends here", is number 256.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from diglot.rendering import Renderer

ALPHABET = b"abc "
STOP = 256  # the place of stop in a next-byte distribution
Floats = NDArray[np.float64]
Tokens = tuple[int, ...]


# ---- tokenizers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Toy:
    """A tokenizer of at most 40 pieces, as the library reads it."""

    name: str
    tokenizer: PreTrainedTokenizerFast
    renderer: Renderer

    @classmethod
    def of(cls, name: str, backend: Tokenizer, **special: str) -> Toy:
        """Wrap a backend whose vocabulary holds `<e>`, the stop token."""
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>", pad_token="<e>", **special)
        return cls(name, tokenizer, Renderer(tokenizer, name=name))

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of each id; none for control tokens."""
        return [self.renderer.vocabulary.token(i) for i in range(len(self.renderer.vocabulary))]

    @property
    def stop(self) -> int:
        return self.renderer.stop_id

    @cache  # noqa: B019 - toys are few and live as long as the tests
    def canonical(self, text: bytes) -> Tokens:
        """The tokens that the tokenizer itself gives for `text`, without stop."""
        tokens = self.renderer.encoder.encode([text.decode()])[0]
        assert tokens.exact.all(), text
        return tuple(tokens.ids.tolist())

    def spell(self, tokens: Tokens) -> bytes:
        """The text of a path."""
        return b"".join(self.pieces[token] for token in tokens)


def _bpe(merges: str, *, by_words: bool) -> Tokenizer:
    """Byte-level BPE from merges as 'a+b ab+c'; `G` stands for the space."""
    pairs = [tuple(m.replace("G", "\u0120").split("+")) for m in merges.split()]
    pieces = ["<e>", *(chr(b) if b != 32 else "\u0120" for b in ALPHABET), *(left + right for left, right in pairs)]
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_words)
    backend.decoder = decoders.ByteLevel()
    return backend


@lru_cache
def bpe_a() -> Toy:
    """BPE that joins from the left and across words."""
    return Toy.of("bpe_a", _bpe("a+b ab+c c+a G+a Ga+b b+G a+a", by_words=False))


@lru_cache
def bpe_b() -> Toy:
    """BPE that joins from the right, inside words only: what a byte belongs to depends on the bytes after it."""
    return Toy.of("bpe_b", _bpe("b+c a+bc c+c G+b G+c a+a Gb+a", by_words=True))


@lru_cache
def letters() -> Toy:
    """One token per byte: the tokenizer that has nothing to choose."""
    return Toy.of("letters", _bpe("", by_words=False))


@lru_cache
def unigram() -> Toy:
    """SentencePiece-like Unigram: the likeliest of all cuts."""
    scores = {"a": -2.0, "b": -2.3, "c": -2.7, "▁": -2.1, "ab": -3.1, "bc": -3.4, "ca": -3.6, "▁a": -3.0, "abc": -4.9}
    pieces = [("<unk>", -20.0), ("<e>", -20.0), *scores.items(), ("▁bc", -4.6), ("cab", -4.4), ("bb", -3.9)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    return Toy.of("unigram", backend, unk_token="<unk>")


TOYS: dict[str, Callable[[], Toy]] = {"bpe_a": bpe_a, "bpe_b": bpe_b, "unigram": unigram, "letters": letters}


# ---- distributions over tokens
# ------------------------------------------------------------------------------------------------


class Distribution(Protocol):
    """An autoregressive distribution over tokens. A state is all that the next row depends on."""

    toy: Toy
    start: Hashable

    def step(self, state: Any, token: int) -> Hashable:
        """The state after one more token."""

    def row(self, state: Any) -> Floats:
        """Probabilities `[V]` of the next token, the stop token among them."""


@dataclass(eq=False)
class RandomDistribution:
    """Log-linear in the last two tokens and the position, with random weights.

    Tokens that would make the text longer than `limit` bytes get no probability, so every path ends with stop.
    State: (token before the last, last token, tokens so far, bytes so far); -1 stands for no token.
    """

    toy: Toy
    limit: int
    seed: int = 0
    scale: float = 1.0
    exactly: int | None = None  # every path has so many tokens before stop, if given
    start: tuple[int, int, int, int] = (-1, -1, 0, 0)
    tables: tuple[Floats, Floats, Floats] = field(init=False)  # by last [V+1, V], by before, by position [limit+1, V]
    _rows: dict[Hashable, Floats] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        draw, size = np.random.default_rng(self.seed), len(self.toy.pieces)
        shapes = (size + 1, size), (size + 1, size), (self.limit + 1, size)
        last, before, position = (self.scale * draw.standard_normal(shape) for shape in shapes)
        self.tables = last, before, position

    def step(self, state: tuple[int, int, int, int], token: int) -> tuple[int, int, int, int]:
        _, last, count, used = state
        return last, token, count + 1, used + len(self.toy.pieces[token])

    def allowed(self, state: tuple[int, int, int, int]) -> NDArray[np.bool_]:
        """Which tokens have probability, `[V]`."""
        _, _, count, used = state
        length = np.array([len(piece) for piece in self.toy.pieces])
        fits = (length > 0) & (used + length <= self.limit)
        ends = self.exactly is None or count == self.exactly
        if self.exactly is not None and ends:
            fits[:] = False
        fits[self.toy.stop] = ends
        return fits

    def row(self, state: tuple[int, int, int, int]) -> Floats:
        if state not in self._rows:
            before, last, count, _ = state
            by_last, by_before, by_position = self.tables
            logits = np.where(self.allowed(state), by_last[last] + by_before[before] + by_position[count], -np.inf)
            weights = np.exp(logits - logits.max())
            self._rows[state] = weights / weights.sum()
        return self._rows[state]


class InducedDistribution:
    """What perfect training on the canonical tokens of a distribution over texts gives: P(path) = P(text) if
    canonical, else 0.

    Two tokenizers can so carry the same distribution over text. State: the path so far.
    """

    start: Tokens = ()

    def __init__(self, toy: Toy, texts: Mapping[bytes, float]) -> None:
        self.toy = toy
        self._masses: dict[Tokens, Floats] = defaultdict(lambda: np.zeros(len(toy.pieces)))
        for text, mass in texts.items():
            path = (*toy.canonical(text), toy.stop)
            for i, token in enumerate(path):
                self._masses[path[:i]][token] += mass

    def step(self, state: Tokens, token: int) -> Tokens:
        return (*state, token)

    def row(self, state: Tokens) -> Floats:
        """`KeyError` after a path that no canonical text has: nothing was said about it."""
        if state not in self._masses:
            raise KeyError(f"{state} begins no canonical path of {self.toy.name}")
        return self._masses[state] / self._masses[state].sum()


# ---- truth about paths -----------------------------------------------------------------------------------------------


def _followers(distribution: Distribution, state: Any) -> Iterator[tuple[int, float]]:
    """Tokens with probability, stop excepted."""
    row = distribution.row(state)
    return ((int(v), float(row[v])) for v in np.flatnonzero(row) if v != distribution.toy.stop)


def states(distribution: Distribution, tokens: Tokens) -> list[Any]:
    """The state before each token of a path, and after the last."""
    results = [distribution.start]
    for token in tokens:
        results.append(distribution.step(results[-1], token))
    return results


def path_probability(distribution: Distribution, tokens: Tokens) -> float:
    """Of the path and then stop."""
    path = (*tokens, distribution.toy.stop)
    return float(np.prod([distribution.row(s)[v] for s, v in zip(states(distribution, tokens), path, strict=True)]))


def paths(distribution: Distribution) -> Iterator[tuple[Tokens, float]]:
    """Every path that ends with stop (not among its tokens), with its probability."""
    open_paths: list[tuple[Tokens, Any, float]] = [((), distribution.start, 1.0)]
    while open_paths:
        tokens, state, mass = open_paths.pop()
        if ends := float(distribution.row(state)[distribution.toy.stop]):
            yield tokens, mass * ends
        open_paths += [
            ((*tokens, v), distribution.step(state, v), mass * p) for v, p in _followers(distribution, state)
        ]


def text_distribution(distribution: Distribution) -> dict[bytes, float]:
    """The distribution over texts, by enumeration of all paths."""
    texts: dict[bytes, float] = defaultdict(float)
    for tokens, mass in paths(distribution):
        texts[distribution.toy.spell(tokens)] += mass
    return dict(texts)


def noncanonical_mass(distribution: Distribution) -> float:
    """Probability that a sampled path is not what the distribution's own tokenizer gives for its text."""
    return sum(
        mass
        for tokens, mass in paths(distribution)
        if distribution.toy.canonical(distribution.toy.spell(tokens)) != tokens
    )


def tokenisations(distribution: Distribution, text: bytes) -> dict[Tokens, float]:
    """The distribution of the path given its text."""
    results: dict[Tokens, float] = {}
    open_paths: list[tuple[Tokens, bytes]] = [((), text)]
    while open_paths:
        tokens, rest = open_paths.pop()
        if not rest and (mass := path_probability(distribution, tokens)):
            results[tokens] = mass
        for v, _ in _followers(distribution, states(distribution, tokens)[-1]):
            if rest.startswith(distribution.toy.pieces[v]):
                open_paths.append(((*tokens, v), rest[len(distribution.toy.pieces[v]) :]))
    total = sum(results.values())
    return {tokens: mass / total for tokens, mass in results.items()}


# ---- truth about text ------------------------------------------------------------------------------------------------


def cover(distribution: Distribution, prefix: bytes) -> tuple[dict[Any, float], Floats]:
    """All paths that agree with a prefix of text, cut at the token that reaches its end.

    Mass by state of those that end where the prefix ends, and mass of those whose last token runs on, by the byte
    that it puts behind the prefix, `[257]`. One pass over byte positions: paths that share a state are summed.
    """
    at: list[dict[Any, float]] = [defaultdict(float) for _ in range(len(prefix) + 1)]
    beyond = np.zeros(STOP + 1)
    at[0][distribution.start] = 1.0
    for position in range(len(prefix)):
        rest = prefix[position:]
        for state, mass in at[position].items():
            for v, p in _followers(distribution, state):
                piece = distribution.toy.pieces[v]
                if rest.startswith(piece):
                    at[position + len(piece)][distribution.step(state, v)] += mass * p
                elif piece.startswith(rest):
                    beyond[piece[len(rest)]] += mass * p
    return at[-1], beyond


def cylinder(distribution: Distribution, prefix: bytes) -> float:
    """Probability that the text starts with `prefix`."""
    ending, beyond = cover(distribution, prefix)
    return sum(ending.values()) + float(beyond.sum())


def text_probability(distribution: Distribution, text: bytes) -> float:
    """Probability of the whole text, over all its tokenisations."""
    ending, _ = cover(distribution, text)
    return sum(mass * float(distribution.row(state)[distribution.toy.stop]) for state, mass in ending.items())


def canonical_probability(distribution: Distribution, text: bytes) -> float:
    """Probability of the one path that the tokenizer gives for the text."""
    return path_probability(distribution, distribution.toy.canonical(text))


def next_byte_distribution(distribution: Distribution, prefix: bytes) -> Floats:
    """Distribution of the byte, or stop, that follows a text that starts with `prefix`, `[257]`."""
    ending, masses = cover(distribution, prefix)
    total = sum(ending.values()) + float(masses.sum())
    for state, mass in ending.items():
        masses[STOP] += mass * float(distribution.row(state)[distribution.toy.stop])
        for v, p in _followers(distribution, state):
            masses[distribution.toy.pieces[v][0]] += mass * p
    return masses / total


# ---- the oracle's check of itself ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """What is said about text. The defaults are the truth; faults are planted by putting others in their place."""

    text_probability: Callable[[Distribution, bytes], float] = text_probability
    cylinder: Callable[[Distribution, bytes], float] = cylinder
    next_byte_distribution: Callable[[Distribution, bytes], Floats] = next_byte_distribution


def errors(distribution: Distribution, answers: Answers | None = None) -> dict[str, float]:
    """How far answers are from each other and from plain enumeration, largest absolute errors.

    mass: all texts together have probability 1. texts: each has what its paths have together. cylinders: a prefix has
    what the texts have that start with it. distributions: next-byte distributions sum to 1. chain: multiplied along
    a text, stop included, they give its probability.
    """
    answers = answers or Answers()
    texts = text_distribution(distribution)
    starting: dict[bytes, float] = defaultdict(float)
    for text, mass in texts.items():
        for end in range(len(text) + 1):
            starting[text[:end]] += mass
    probabilities = {text: answers.text_probability(distribution, text) for text in texts}
    distributions = {prefix: answers.next_byte_distribution(distribution, prefix) for prefix in starting}

    def chained(text: bytes) -> float:
        return float(np.prod([distributions[text[:i]][b] for i, b in enumerate((*text, STOP))]))

    return {
        "mass": abs(sum(probabilities.values()) - 1),
        "texts": max(abs(probabilities[text] - mass) for text, mass in texts.items()),
        "cylinders": max(abs(answers.cylinder(distribution, prefix) - mass) for prefix, mass in starting.items()),
        "distributions": max(abs(float(result.sum()) - 1) for result in distributions.values()),
        "chain": max(abs(chained(text) - probabilities[text]) for text in texts),
    }
