"""Where the teacher is read for a covering distribution: what the text alone says, before any model runs.

A *boundary* is a byte of a segment at which a scored student token starts. The teacher's distribution over what comes
next there is spread over several of its rows: the row behind its own reading of the text so far, and the rows of
earlier boundaries, whose longer tokens run past the boundary. Where its reading of the whole text has a token across
the boundary, its reading of the text *so far* is other tokens, which it must be asked about: a branch.

Shapes: `R` boundaries that are compared, `N_t` scored teacher tokens, `E` tokens of branches, `Q` pairs of a row and a
boundary that tokens of this row run past.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diglot.batches import Written
from diglot.objectives.base import Encode
from diglot.objectives.spanning import plain_tokens
from diglot.objectives.tail import TailTokens
from diglot.vocabulary import Vocabulary

Ints = NDArray[np.int64]
_BACK = 16  # teacher tokens before a boundary from which its reading of the text so far is made anew, at most
_SPACE = frozenset(b" \t\n\r")


@dataclass(frozen=True)
class EarlierRows:
    """Rows of earlier boundaries that have tokens which run past a later one, `[Q]` each."""

    row: Ints
    main: Ints  # as in the plan, of the row's own boundary
    last: Ints
    to: Ints  # the later boundary
    low: Ints  # sorted_ids[low:high] are the tokens that run past it
    high: Ints
    consumed: Ints  # how many bytes of them lie before it


@dataclass(frozen=True)
class CoveringPlan:
    """Rows `0 .. N_t - 1` predict the teacher's tokens, row `N_t + e` follows branch token `e`."""

    student: Ints  # [R] token whose predicting row is compared
    previous: Ints  # [R] student token that ends at the boundary, -1: the segment starts there
    following: Ints  # [R] which boundary is at the end of the student's token, -1: none is compared there
    own: Ints  # [R] the teacher's row behind its reading of the text so far
    branch: TailTokens
    last: Ints  # [R] the branch's last token, -1: the boundary is one of the teacher's own
    main: Ints  # [R] the teacher token that starts at the boundary, or in whose place the branch begins
    earlier: EarlierRows
    skipped: dict[str, int]  # why boundaries are not compared -> how many

    @property
    def items(self) -> int:
        """Over how many rows the values are averaged."""
        return len(self.student)


def plan_covering(written: Written, student: Vocabulary, teacher: Vocabulary, encode_t: Encode) -> CoveringPlan:
    """All boundaries of a batch, the teacher's branches, and the earlier rows whose tokens run past each."""
    s, t = written.student, written.teacher
    lengths = np.array([len(text) for text in written.texts], dtype=np.int64)
    data = np.frombuffer(b"".join(written.texts), dtype=np.uint8)
    offset = np.cumsum(lengths + 1) - (lengths + 1)  # one place more for the end of each segment
    wanted = np.flatnonzero(written.usable_s & plain_tokens(s, student) & (s.start <= _at(lengths, s.segment)))
    key = offset[s.segment[wanted]] + s.start[wanted]
    main_at = np.full(int((lengths + 1).sum()), -1, dtype=np.int64)
    good_t = np.flatnonzero(t.exact & plain_tokens(t, teacher) & (t.start <= _at(lengths, t.segment)))[::-1]
    main_at[offset[t.segment[good_t]] + t.start[good_t]] = good_t
    inside = np.flatnonzero(main_at[key] < 0)
    branch, found, why, ends = _branches(written, wanted, inside, encode_t, teacher.word_cuts)
    comparable = main_at[key] >= 0
    comparable[inside[found >= 0]] = True
    last = np.full(len(wanted), -1, dtype=np.int64)
    last[inside] = found
    wanted, key, last = wanted[comparable], key[comparable], last[comparable]
    main = np.where(last >= 0, branch.before[last] if len(branch.ids) else 0, main_at[key])
    own = np.where(last >= 0, len(t.ids) + last, main)

    row_at = np.full(len(main_at), -1, dtype=np.int64)
    row_at[key] = np.arange(len(wanted))
    opens = s.start[wanted] == 0
    same = (wanted > 0) & (s.segment[np.maximum(wanted - 1, 0)] == s.segment[wanted]) & ~opens
    end = offset[s.segment[wanted]] + s.end[wanted]
    text_end = s.stop[wanted] | (s.end[wanted] > _at(lengths, s.segment[wanted]))
    following = np.where(text_end, -1, row_at[np.minimum(end, len(row_at) - 1)])

    sources = _Sources(key, own, main, last)
    at_branch = offset[t.segment[branch.before]] + ends if len(ends) else ends
    earlier = _pairs(sources, main_at, row_at, data, lengths, offset, teacher, t.start, branch, at_branch)
    previous = np.where(same, wanted - 1, -1)
    return CoveringPlan(wanted, previous, following, own, branch, last, main, earlier, {"character": why})


def _at(lengths: Ints, segment: Ints) -> Ints:
    return lengths[segment] if len(lengths) else np.zeros(len(segment), dtype=np.int64)


def _branches(
    written: Written, wanted: Ints, inside: Ints, encode_t: Encode, cuts: frozenset[int]
) -> tuple[TailTokens, Ints, int, Ints]:
    """The teacher's reading of the text up to each of the boundaries `inside`; the last token of each, -1: none; how
    many boundaries are inside a character; the byte end of each of the branches' tokens."""
    s, t, jobs, texts = written.student, written.teacher, [], []
    stride = int(max(t.start.max(initial=0), s.start.max(initial=0))) + 2
    at = np.searchsorted(t.segment * stride + t.start, s.segment[wanted[inside]] * stride + s.start[wanted[inside]])
    for k, (i, j) in enumerate(zip(wanted[inside].tolist(), (at - 1).tolist(), strict=True)):
        text, boundary = written.texts[s.segment[i]], int(s.start[i])
        if j < 0 or t.segment[j] != s.segment[i]:
            continue
        first = _word_start(written, j, text, cuts)
        try:
            texts.append(text[t.start[first] : boundary].decode("utf-8"))
        except UnicodeDecodeError:
            continue  # the boundary lies inside a character: the teacher cannot be asked about half of one
        jobs.append((k, first))
    ids: list[int] = []
    before: list[int] = []
    depth: list[int] = []
    row: list[int] = []
    ends: list[int] = []
    found = np.full(len(inside), -1, dtype=np.int64)
    for (k, first), encoded in zip(jobs, encode_t(texts) if texts else (), strict=True):
        if not len(encoded.ids) or not encoded.exact.all():
            continue
        common = 0
        while (
            common < len(encoded.ids) - 1
            and first + common < len(t.ids)
            and (encoded.ids[common] == t.ids[first + common])
        ):
            common += 1
        for d, token in enumerate(encoded.ids[common:].tolist()):
            row.append(first + common if d == 0 else len(t.ids) + len(ids) - 1)
            ids.append(token)
            before.append(first + common)
            ends.append(int(t.start[first] + encoded.ends[common + d]))
            depth.append(d)
        found[k] = len(ids) - 1
    arrays = (np.array(x, dtype=np.int64) for x in (ids, before, depth, row))
    return TailTokens(*arrays), found, int((found < 0).sum()), np.array(ends, dtype=np.int64)


def _word_start(written: Written, j: int, text: bytes, cuts: frozenset[int]) -> int:
    """A teacher token not after `j` before which its tokenizer cuts the text whatever follows: where a word begins.

    `j` itself where there is none near: its boundary may then depend on what follows.
    """
    t = written.teacher
    for first in range(j, max(j - _BACK, -1), -1):
        start = int(t.start[first])
        if start == 0 or (text[start] in cuts and text[start - 1] not in _SPACE):
            return first
        if first == 0 or t.segment[first - 1] != t.segment[j] or not t.exact[first - 1]:
            return first
    return j


@dataclass(frozen=True)
class _Sources:
    key: Ints
    row: Ints
    main: Ints
    last: Ints


def _pairs(
    boundaries: _Sources,
    main_at: Ints,
    row_at: Ints,
    data: NDArray[np.uint8],
    lengths: Ints,
    offset: Ints,
    teacher: Vocabulary,
    start_t: Ints,
    branch: TailTokens,
    at_branch: Ints,
) -> EarlierRows:
    """Which earlier rows have tokens that run past which boundaries: walks of the teacher's trie from all of them."""
    main, last = boundaries.main, boundaries.last
    own_key = np.flatnonzero(main_at >= 0)
    own_key = own_key[row_at[own_key] < 0]  # the teacher's boundaries that are none of the student's
    # Those in a branch belong to the reading of the text up to this branch's end. Without them a target would depend
    # on whether the whole text's reading happens to have them, that is, on what comes later.
    tails = np.flatnonzero(row_at[at_branch] < 0)
    number = np.cumsum(branch.depth == 0)  # [E] from 1
    key = np.concatenate([boundaries.key, own_key, at_branch[tails]])
    rows = boundaries.row, main_at[own_key], len(start_t) + tails
    row, at_main = np.concatenate(rows), np.concatenate([boundaries.main, main_at[own_key], branch.before[tails]])
    at_last = np.concatenate([boundaries.last, np.full(len(own_key), -1), tails])
    only_teacher = np.arange(len(key)) >= len(boundaries.key)
    only_in = np.concatenate([np.zeros(len(key) - len(tails), dtype=np.int64), number[tails]])
    branch_of = np.where(last >= 0, number[last] if len(number) else 0, 0)
    segment = np.searchsorted(offset, key, side="right") - 1
    begin = key - segment  # `data` has no place for the ends of segments
    end = offset[segment] - segment + lengths[segment]
    trie, parts = teacher.trie, [(np.zeros(0, dtype=np.int64),) * 7]
    for on, depth, node in trie.walk(data, begin, end) if len(main) else ():  # nothing scored: nothing to reach
        to = row_at[key[on] + depth]
        hit = to >= 0
        # A boundary of the whole text's reading belongs to that of the text so far up to where the two part.
        parted = only_teacher[on] & (last[np.maximum(to, 0)] >= 0)
        hit &= (only_in[on] == 0) | (only_in[on] == branch_of[np.maximum(to, 0)])
        hit &= ~parted | (only_in[on] > 0) | (start_t[at_main[on]] <= start_t[main[np.maximum(to, 0)]])
        on, to, node = on[hit], to[hit], node[hit]
        low, high = trie.low[node].copy(), trie.high[node]
        for _ in range(4):  # tokens that end at the boundary come first; rarely several spell the same bytes
            ends_here = (low < high) & (
                teacher.lengths[trie.sorted_ids[np.minimum(low, len(trie.sorted_ids) - 1)]] == depth
            )
            low += ends_here
        some = low < high
        found = row[on], at_main[on], at_last[on], to, low, high, np.full(len(on), depth)
        parts.append(tuple(x[some] for x in found))
    return EarlierRows(*(np.concatenate(x) for x in zip(*parts, strict=True)))
