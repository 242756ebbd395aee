"""Student tokens that run past the end of the written teacher token, along the text that was written."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diglot.arrays import Bools, Ints
from diglot.batches import Written, WrittenSide
from diglot.vocabulary import Vocabulary


@dataclass(frozen=True)
class Spanning:
    """Candidates `[Q]`, in order of row and length."""

    row: Ints  # which of the given rows
    place: Ints  # 0 for the shortest candidate of its row, 1 for the next ...
    token: Ints  # the student token
    last: Ints  # teacher token in which it ends
    tail: tuple[Ints, Ints]  # range of sorted teacher tokens that start with what the candidate covers of `last`
    whole: Ints  # teacher tokens that some candidate covers whole, ascending


def spanning(written: Written, i: Ints, j: Ints, student: Vocabulary, teacher: Vocabulary) -> Spanning:
    """All student tokens that student token `i[k]` starts with, itself included, and that end after teacher token
    `j[k]`.

    `[K]` rows. Candidates end no later than the written student token, so that no row looks past what it predicts, and
    inside teacher tokens of exact chunks.
    """
    s, t = written.student, written.teacher
    lengths = np.array([len(text) for text in written.texts], dtype=np.int64)
    begin = np.cumsum(lengths) - lengths
    data = np.frombuffer(b"".join(written.texts), dtype=np.uint8)
    segment, start, until = s.segment[i], s.start[i], t.end[j]
    hits = []
    end = np.minimum(s.end[i], lengths[segment])
    for on, depth, node in student.trie.walk(data, begin[segment] + start, begin[segment] + end):
        token = student.trie.token[node]
        hit = (token >= 0) & (start[on] + depth > until[on])
        hits.append((on[hit], np.full(int(hit.sum()), depth), token[hit]))
    row, depth_of, token = (np.concatenate(parts) for parts in zip(*hits, strict=True)) if hits else (_NONE,) * 3
    order = np.lexsort((depth_of, row))
    row, depth_of, token = row[order], depth_of[order], token[order]

    stride = int(max(t.end.max(initial=0), s.end.max(initial=0))) + 1
    end = start[row] + depth_of
    last = np.searchsorted(t.segment * stride + t.end, segment[row] * stride + end)
    unusable = np.concatenate([[0], np.cumsum(~written.usable_t)])
    valid = last < len(t.ids)
    valid[valid] &= unusable[last[valid] + 1] == unusable[j[row[valid]]]
    valid[valid] &= t.segment[last[valid]] == segment[row[valid]]
    row, end, token, last = row[valid], end[valid], token[valid], last[valid]
    place = np.arange(len(row)) - np.searchsorted(row, row)
    covered = np.zeros(len(t.ids) + 1, dtype=np.int64)
    np.add.at(covered, j[row], 1)
    np.add.at(covered, last, -1)
    tail = prefix_range(teacher, t.ids[last], end - t.start[last])
    return Spanning(row, place, token, last, tail, np.flatnonzero(np.cumsum(covered[:-1]) > 0))


_NONE = np.zeros(0, dtype=np.int64)


def prefix_range(vocabulary: Vocabulary, ids: Ints, length: Ints) -> tuple[Ints, Ints]:
    """The range of sorted tokens that start with the first `length` bytes of each of `ids`; empty where that is 0."""
    trie = vocabulary.trie
    inside = length > 0
    low, high = np.zeros(len(ids), dtype=np.int64), np.zeros(len(ids), dtype=np.int64)
    node = trie.node_at[vocabulary.offsets[ids[inside]] + length[inside] - 1]
    low[inside], high[inside] = trie.low[node], trie.high[node]
    return low, high


def plain_tokens(side: WrittenSide, vocabulary: Vocabulary) -> Bools:
    """Which tokens stand for the bytes of the table, or for stop, `[N]`.

    Some tokenizers' first or last token of a text stands for its bytes without a space.
    """
    plain: Bools = side.stop | ((vocabulary.lengths[side.ids] == side.end - side.start) & (side.end > side.start))
    return plain
