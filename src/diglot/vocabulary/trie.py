"""The tokens of a vocabulary in order of their bytes: every prefix is one range of that order.

So the mass of "the next bytes start like this" is the sum over one slice of sorted columns, and walking over bytes is
a search in one sorted array, for all starting points at once.

Shapes: `M` tokens in the trie, `P` prefixes (nodes; node 0 is the empty one), `D` bytes of the vocabulary's table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from diglot.arrays import Ints
from diglot.vocabulary.cache import Table


@dataclass(frozen=True)
class ByteTrie:
    """Prefixes of the tokens of a vocabulary, or of some of them."""

    sorted_ids: Ints  # [M] ids, ascending by their bytes
    low: Ints  # [P] tokens with this prefix are sorted_ids[low:high]
    high: Ints  # [P]
    token: Ints  # [P] the id that spells exactly this prefix (the smallest of several), or -1
    node_at: Ints  # [D] node of the prefix that ends with this byte of the table; -1 in tokens that are not in the trie
    edges: Ints  # [P - 1] ascending; edge k = 256 * parent + byte leads to node k + 1

    @classmethod
    def of(cls, vocabulary: Table, ids: Ints | None = None) -> ByteTrie:
        """The trie of the tokens `ids`, by default of all that have bytes."""
        if ids is None:
            ids = np.flatnonzero(vocabulary.lengths > 0)
        tokens = vocabulary.tokens()
        sorted_ids = np.array(sorted(ids.tolist(), key=tokens.__getitem__), dtype=np.int64)
        begin, length = vocabulary.offsets[sorted_ids], vocabulary.lengths[sorted_ids]
        node_at = np.full(len(vocabulary.data), -1, dtype=np.int64)
        node = np.zeros(len(sorted_ids), dtype=np.int64)  # of each token's prefix so far
        low, high, token = [np.zeros(1, np.int64)], [np.array([len(sorted_ids)])], [np.array([-1])]
        edges = [np.zeros(0, np.int64)]
        alive, depth, count = np.arange(len(sorted_ids)), 0, 1
        while len(alive := alive[length[alive] > depth]):
            at = begin[alive] + depth
            key = node[alive] * 256 + vocabulary.data[at]
            first = np.flatnonzero(np.diff(key, prepend=-1))  # equal prefixes are neighbours
            own = count + np.cumsum(np.diff(key, prepend=-1) != 0) - 1
            node[alive] = node_at[at] = own
            low.append(alive[first])
            high.append(np.append(alive[first[1:] - 1], alive[-1]) + 1)
            edges.append(key[first])
            ending = np.full(len(first), -1, dtype=np.int64)
            whole = np.flatnonzero(length[alive] == depth + 1)[::-1]  # of equal tokens the first one is set last
            ending[own[whole] - count] = sorted_ids[alive[whole]]
            token.append(ending)
            count, depth = count + len(first), depth + 1
        ranges = np.concatenate(low), np.concatenate(high)
        return cls(sorted_ids, *ranges, np.concatenate(token), node_at, np.concatenate(edges))

    @cached_property
    def first_child(self) -> Ints:
        """Children of node `k` are the nodes `first_child[k]` to `first_child[k + 1]`, by ascending byte, [P + 1]."""
        return np.searchsorted(self.edges, np.arange(len(self.low) + 1) * 256) + 1

    @cached_property
    def byte(self) -> Ints:
        """Last byte of each node's prefix, [P]; 0 for the empty one."""
        return np.concatenate([[0], self.edges % 256])

    def walk(self, data: NDArray[np.uint8], begin: Ints, end: Ints) -> Iterator[tuple[Ints, int, Ints]]:
        """Follow `data[begin[k]:end[k]]` for all `k` at once, until no token starts with what was read.

        Yields after each byte (which `k` are still on, bytes read, the node of each of them).
        """
        on, node, depth = np.arange(len(begin)), np.zeros(len(begin), dtype=np.int64), 0
        while len(self.edges):
            inside = begin[on] + depth < end[on]
            on, node = on[inside], node[inside]
            if not len(on):
                return
            key = node * 256 + data[begin[on] + depth]
            at = np.minimum(np.searchsorted(self.edges, key), len(self.edges) - 1)
            matches = self.edges[at] == key
            on, node, depth = on[matches], at[matches] + 1, depth + 1
            yield on, depth, node

    def longest(self, data: NDArray[np.uint8], begin: Ints, end: Ints) -> Ints:
        """The longest token that `data[begin[k]:end[k]]` starts with, or -1, `[K]`."""
        best = np.full(len(begin), -1, dtype=np.int64)
        for on, _, node in self.walk(data, begin, end):
            token = self.token[node]
            best[on[token >= 0]] = token[token >= 0]
        return best
