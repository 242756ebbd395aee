"""From the tokens of one vocabulary to those of another, by their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from diglot.arrays import Ints
from diglot.vocabulary.cache import cached
from diglot.vocabulary.table import Vocabulary
from diglot.vocabulary.trie import ByteTrie

if TYPE_CHECKING:
    from diglot.vocabulary.encoder import Speller


def greedy_tokens(source: Vocabulary, target: Vocabulary) -> Ints:
    """For each byte of `source`'s table the longest token of `target` that the rest of the token starts with, or -1.

    `[D]`: entry `offsets[u] + c` belongs to token `u` after its first `c` bytes.
    """

    def build() -> dict[str, Ints]:
        ends = np.repeat(source.offsets[1:], source.lengths)
        return {"longest": target.trie.longest(source.data, np.arange(len(source.data)), ends)}

    return cached("greedy", [source, target], build)["longest"]


def continuing(vocabulary: Vocabulary, spell: Speller) -> Speller:
    """`spell`, and None where its first token has a space that the text has not.

    Such a token begins a word (WordPiece), and says nothing of a text that goes on with one.
    """

    def spelt(texts: Sequence[bytes]) -> list[list[int] | None]:
        read = zip(texts, spell(texts), strict=True)
        return [ids if ids and b"".join(map(vocabulary.token, ids)) == text else None for text, ids in read]

    return spelt


def first_tokens(source: Vocabulary, target: Vocabulary, spell: Speller) -> Ints:
    """The first token that `spell`, the tokenizer of `target`, gives for the text of each token of `source`, `[V]`.

    Only texts that are no token of `target` are encoded: of 128,000 tokens some 20,000. Tokens that are no text on
    their own, or that are not encoded exactly, have the longest token that they start with; -1: there is none.
    """
    longest = greedy_tokens(source, target)
    begin = np.minimum(source.offsets[:-1], max(len(longest) - 1, 0))
    first = np.where(source.lengths > 0, longest[begin] if len(longest) else -1, -1)
    unshared = np.flatnonzero((source.lengths > 0) & (target.lengths[np.maximum(first, 0)] != source.lengths)).tolist()
    for k, ids in zip(unshared, continuing(target, spell)(list(map(source.token, unshared))), strict=True):
        if ids:
            first[k] = ids[0]
    return first


@dataclass(frozen=True)
class Cells:
    """One partition for two vocabularies: shared tokens `[0, K)`, then 256 first bytes, then one cell for the rest."""

    student: Ints  # [V_s] cell of each id
    teacher: Ints  # [V_t]
    count: int  # K + 257


def shared_prefix_cells(student: Vocabulary, teacher: Vocabulary) -> Cells:
    """Each token's cell is the longest shared token that its bytes start with, its first byte where there is none.

    Shared are byte strings that are a token on both sides; several ids with the same bytes fall into one cell. Tokens
    without bytes (controls, padding) are in the last cell, and those whose first byte opens a cell on one side only:
    the other side has nothing but its unknown token for them.
    """
    cells = cached("cells", [student, teacher], lambda: _cells(student, teacher))
    return Cells(cells["student"], cells["teacher"], int(cells["count"][0]))


def _cells(student: Vocabulary, teacher: Vocabulary) -> dict[str, Ints]:
    shared = _shared_strings(student, teacher)
    trie = ByteTrie.of(student, shared)
    cell_of = np.full(len(student), -1, dtype=np.int64)
    cell_of[shared] = np.arange(len(shared))

    def cells(vocabulary: Vocabulary) -> Ints:
        begin, end = vocabulary.offsets[:-1], vocabulary.offsets[1:]
        longest = trie.longest(vocabulary.data, begin, end)
        cell = np.full(len(vocabulary), len(shared) + 256, dtype=np.int64)
        texts = end > begin
        cell[texts] = len(shared) + vocabulary.data[begin[texts]].astype(np.int64)
        return np.where(longest >= 0, cell_of[longest], cell)

    cells_s, cells_t, rest = cells(student), cells(teacher), len(shared) + 256
    one_sided = np.setxor1d(cells_s, cells_t)
    for side in (cells_s, cells_t):
        side[np.isin(side, one_sided)] = rest
    return {"student": cells_s, "teacher": cells_t, "count": np.array([rest + 1])}


def _shared_strings(student: Vocabulary, teacher: Vocabulary) -> Ints:
    """One student id for each byte string that is a token on both sides, ascending."""
    longest = teacher.trie.longest(student.data, student.offsets[:-1], student.offsets[1:])
    whole = (longest >= 0) & (teacher.lengths[longest] == student.lengths)
    return np.intersect1d(np.flatnonzero(whole), student.trie.token)
