"""Where the teacher is read for a covering distribution: what the text alone says, before any model runs.

A *boundary* is a byte of a segment at which a scored student token starts. The teacher's distribution over what comes
next there is spread over several of its rows: the row behind its own reading of the text so far, and the rows of
earlier boundaries, whose longer tokens run past the boundary. Where its reading of the whole text has a token across
the boundary, its reading of the text *so far* is other tokens, which it must be asked about: a branch.

Shapes: `R` boundaries that are compared, `N_t` scored teacher tokens, `E` tokens of branches, `Q` pairs of a row and a
boundary that tokens of this row run past.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diglot.batches import Written
from diglot.objectives.spanning import plain_tokens
from diglot.objectives.tail import TailTokens
from diglot.vocabulary import Speller, Vocabulary

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
    extra: NDArray[np.bool_]  # the row's place may be known from what comes later only

    def at(self, which: NDArray[Any]) -> EarlierRows:
        """Some of them, by numbers or by a mask."""
        return EarlierRows(*(getattr(self, name)[which] for name in self.__dataclass_fields__))

    def where(self, mask: NDArray[np.bool_], extra: NDArray[np.bool_]) -> EarlierRows:
        """Those of a mask, marked anew."""
        return replace(self, extra=extra).at(mask)


@dataclass(frozen=True)
class Prefixes:
    """Tokens of the teacher that spell what comes next in the text behind its own rows, `[P]` each."""

    row: Ints
    token: Ints
    length: Ints  # in bytes


@dataclass(frozen=True)
class Ground:
    """The texts as one row of bytes with a place more at the end of each, `[D + S]`, and what starts where."""

    data: NDArray[np.uint8]  # [D] without these places
    lengths: Ints  # [S] of the segments, in bytes
    offset: Ints  # [S] where they begin
    main_at: Ints  # [D + S] the teacher's token that starts there, -1: none
    row_at: Ints  # [D + S] the boundary that is compared there, -1: none

    def span(self, key: Ints) -> tuple[Ints, Ints]:
        """Places of `data` from `key` to the end of its segment."""
        segment = np.searchsorted(self.offset, key, side="right") - 1
        return key - segment, self.offset[segment] - segment + self.lengths[segment]


@dataclass(frozen=True)
class Boundaries:
    """Rows `0 .. N_t - 1` predict the teacher's tokens, row `N_t + e` follows branch token `e`."""

    student: Ints  # [R] token whose predicting row is compared
    previous: Ints  # [R] student token that ends at the boundary, -1: the segment starts there
    following: Ints  # [R] which boundary is at the end of the student's token, -1: none is compared there
    own: Ints  # [R] the teacher's row behind its reading of the text so far
    branch: TailTokens
    last: Ints  # [R] the branch's last token, -1: the boundary is one of the teacher's own
    main: Ints  # [R] the teacher token that starts at the boundary, or in whose place the branch begins
    key: Ints  # [R] the boundary's place of the ground
    skipped: dict[str, int]  # why boundaries are not compared -> how many
    ground: Ground

    @property
    def items(self) -> int:
        """Over how many rows the values are averaged."""
        return len(self.student)


@dataclass(frozen=True)
class CoveringPlan(Boundaries):
    """With the rows whose tokens run past them."""

    earlier: EarlierRows
    prefixes: Prefixes


def plan_covering(written: Written, student: Vocabulary, teacher: Vocabulary, spell_t: Speller) -> CoveringPlan:
    """All boundaries of a batch, the teacher's branches, and the earlier rows whose tokens run past each."""
    boundaries, ends = find_boundaries(written, student, teacher, spell_t)
    earlier, prefixes = _earlier(written, boundaries, ends, teacher), _prefixes(boundaries.ground, teacher)
    return CoveringPlan(**vars(boundaries), earlier=earlier, prefixes=prefixes)


def find_boundaries(
    written: Written, student: Vocabulary, teacher: Vocabulary, spell_t: Speller
) -> tuple[Boundaries, Ints]:
    """All boundaries of a batch with the teacher's branches to them, and the byte end of each branch token."""
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
    branch, final, ends = branches_to(written, s.segment[wanted[inside]], s.start[wanted[inside]], spell_t, teacher)
    comparable = main_at[key] >= 0
    comparable[inside[final >= 0]] = True
    last = np.full(len(wanted), -1, dtype=np.int64)
    last[inside] = final
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
    previous = np.where(same, wanted - 1, -1)

    ground = Ground(data, lengths, offset, main_at, row_at)
    skipped = {"unreadable": int((final < 0).sum())}
    return Boundaries(wanted, previous, following, own, branch, last, main, key, skipped, ground), ends


def _at(lengths: Ints, segment: Ints) -> Ints:
    return lengths[segment] if len(lengths) else np.zeros(len(segment), dtype=np.int64)


def branches_to(
    written: Written, segment: Ints, position: Ints, spell_t: Speller, teacher: Vocabulary, first_row: int = 0
) -> tuple[TailTokens, Ints, Ints]:
    """The teacher's reading of the text up to `position` of a segment; the last token of each, -1: none; and the byte
    end of each of the branches' tokens.

    No tokenizer reads half a character. Its bytes are spelt behind the reading of what stands before it, as they are
    where the teacher has no token for a whole one. `first_row` is how many branch tokens there are already.
    """
    t = written.teacher
    base, jobs, texts = len(t.ids) + first_row, [], list[bytes]()
    stride = int(max(t.start.max(initial=0), position.max(initial=0))) + 2
    at = np.searchsorted(t.segment * stride + t.start, segment * stride + position)
    for k, (which, boundary, j) in enumerate(zip(segment.tolist(), position.tolist(), (at - 1).tolist(), strict=True)):
        text = written.texts[which]
        if j < 0 or t.segment[j] != which:
            continue
        first = _word_start(written, j, text, teacher.word_cuts)
        whole, half = _whole_characters(text[t.start[first] : boundary])
        spelt = _spelt(half, teacher)
        if whole is not None and spelt is not None:
            texts.append(whole)
            jobs.append((k, first, spelt))
    ids: list[int] = []
    before: list[int] = []
    depth: list[int] = []
    row: list[int] = []
    ends: list[int] = []
    last = np.full(len(position), -1, dtype=np.int64)
    for (k, first, spelt), whole, written_as in zip(jobs, texts, spell_t(texts), strict=True):
        if written_as is None or not (reading := [*written_as, *spelt]):
            continue
        behind = len(whole) + np.cumsum(teacher.lengths[spelt])
        at_end = int(t.start[first]) + np.append(teacher.ends_in(whole, written_as), behind)
        common = 0
        while common < len(reading) - 1 and first + common < len(t.ids) and reading[common] == t.ids[first + common]:
            common += 1
        for d, token in enumerate(reading[common:]):
            row.append(first + common if d == 0 else base + len(ids) - 1)
            ids.append(token)
            before.append(first + common)
            ends.append(int(at_end[common + d]))
            depth.append(d)
        last[k] = len(ids) - 1
    arrays = (np.array(x, dtype=np.int64) for x in (ids, before, depth, row))
    return TailTokens(*arrays), last, np.array(ends, dtype=np.int64)


def _whole_characters(text: bytes) -> tuple[bytes | None, bytes]:
    """A text up to its last whole character, and the bytes behind it; None if it has broken ones elsewhere."""
    for half in range(min(4, len(text) + 1)):
        with suppress(UnicodeDecodeError):
            text[: len(text) - half].decode("utf-8")
            return text[: len(text) - half], text[len(text) - half :]
    return None, b""


def _spelt(half: bytes, teacher: Vocabulary) -> list[int] | None:
    """The longest tokens that spell some bytes, from the left; None if there are none."""
    data, ids, at = np.frombuffer(half, dtype=np.uint8), list[int](), 0
    while at < len(half):
        token = int(teacher.trie.longest(data, np.array([at]), np.array([len(half)]))[0])
        if token < 0:
            return None
        ids.append(token)
        at += int(teacher.lengths[token])
    return ids


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


def _earlier(written: Written, boundaries: Boundaries, ends: Ints, teacher: Vocabulary) -> EarlierRows:
    """Pairs of rows that are known from the text: of the student's boundaries, of the teacher's own, and of those
    inside branches."""
    ground, branch, main, last = boundaries.ground, boundaries.branch, boundaries.main, boundaries.last
    main_at, t = ground.main_at, written.teacher
    alone = np.flatnonzero((main_at >= 0) & (ground.row_at < 0))
    in_branch = ground.offset[t.segment[branch.before]] + ends if len(ends) else ends
    tails = np.flatnonzero(ground.row_at[in_branch] < 0)
    sources = (
        (boundaries.key, boundaries.own, main, last),
        (alone, main_at[alone], main_at[alone], np.full(len(alone), -1)),
        (in_branch[tails], len(t.ids) + tails, branch.before[tails], tails),
    )
    key, row, first, end_of = (np.concatenate(x) for x in zip(*sources, strict=True))
    pairs = pairs_from(key, row, first, end_of, ground, teacher)
    # A boundary inside a branch belongs to the reading of the text up to this branch's end. One of the whole text's
    # reading belongs to that of the text so far up to where the two part; behind, it depends on what comes later.
    number = np.cumsum(branch.depth == 0)  # [E] from 1
    ends_in = np.where(last >= 0, number[last] if len(number) else 0, 0)[pairs.to]
    of_text, of_tail = pairs.row < len(t.ids), np.isin(pairs.row, len(t.ids) + tails)
    number_of = np.concatenate([np.zeros(len(t.ids), dtype=np.int64), number])[pairs.row]
    own = ~of_tail | (number_of == ends_in)
    alone_row = of_text & np.isin(pairs.row, main_at[alone])
    extra = alone_row & (last[pairs.to] >= 0) & (t.start[pairs.main] > t.start[main[pairs.to]])
    return unlike(pairs.where(own, extra))


def unlike(pairs: EarlierRows) -> EarlierRows:
    """One pair for each place and boundary: of those that are there twice, one whose place is known from the past."""
    order = np.lexsort((pairs.extra, pairs.consumed, pairs.to))
    to, consumed = pairs.to[order], pairs.consumed[order]
    again = np.zeros(len(order), dtype=np.bool_)
    again[1:] = (to[1:] == to[:-1]) & (consumed[1:] == consumed[:-1])
    return pairs.at(np.sort(order[~again]))


def pairs_from(key: Ints, row: Ints, main: Ints, last: Ints, ground: Ground, teacher: Vocabulary) -> EarlierRows:
    """Which rows have tokens that run past which boundaries: walks of the teacher's trie from all of them.

    `key` is the place of each row, `[n]`, the others as in `EarlierRows`. All are marked as extra.
    """
    trie, parts = teacher.trie, [tuple(np.zeros(0, dtype=np.int64) for _ in range(7))]
    walked = trie.walk(ground.data, *ground.span(key)) if len(ground.data) and len(key) else ()
    for on, depth, node in walked:
        to = ground.row_at[key[on] + depth]
        hit = to >= 0
        on, to, node = on[hit], to[hit], node[hit]
        low, high = trie.low[node].copy(), trie.high[node]
        for _ in range(4):  # tokens that end at the boundary come first; rarely several spell the same bytes
            ends_here = (low < high) & (
                teacher.lengths[trie.sorted_ids[np.minimum(low, len(trie.sorted_ids) - 1)]] == depth
            )
            low += ends_here
        some = low < high
        columns = row[on], main[on], last[on], to, low, high, np.full(len(on), depth)
        parts.append(tuple(x[some] for x in columns))
    fields: list[Any] = [np.concatenate(x) for x in zip(*parts, strict=True)]
    fields.append(np.ones(len(fields[0]), dtype=np.bool_))
    return EarlierRows(*fields)


def _prefixes(ground: Ground, teacher: Vocabulary) -> Prefixes:
    """Of all rows of the text's own reading."""
    key, trie = np.flatnonzero(ground.main_at >= 0), teacher.trie
    parts = [tuple(np.zeros(0, dtype=np.int64) for _ in range(3))]
    walked = trie.walk(ground.data, *ground.span(key)) if len(ground.data) and len(key) else ()
    for on, depth, node in walked:
        token = trie.sorted_ids[np.minimum(trie.low[node], len(trie.sorted_ids) - 1)]
        some = (trie.low[node] < trie.high[node]) & (teacher.lengths[token] == depth)
        parts.append((ground.main_at[key[on[some]]], token[some], np.full(int(some.sum()), depth)))
    return Prefixes(*(np.concatenate(x) for x in zip(*parts, strict=True)))
