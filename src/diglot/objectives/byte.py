"""The next-byte distribution of both models at every byte of the text: the one alphabet that needs no map between
vocabularies.

A row of token probabilities says which byte comes next: sum over the tokens that start with the bytes written since the
token began, by the byte that follows in them. Where a written token ends, two stories remain, that it ended there and
that it was the beginning of a longer one; the distribution is their mixture. Stop is the 257th letter.

Shapes: `N` tokens of a side, `Q` queries (a token's row after its first 0, 1, ... bytes), `I` bytes that are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from diglot.arrays import Bools, Ints
from diglot.batches import Written, WrittenSide
from diglot.batches.sending import sent, sent_record
from diglot.errors import ConfigError
from diglot.objectives.base import SummaryObjective, at_least_float32, check_range
from diglot.objectives.divergences import generalized_jsd
from diglot.objectives.masses import FLOOR, log_mass, ragged
from diglot.objectives.pair import Pair
from diglot.objectives.scores import Metrics, Scores, Values
from diglot.objectives.spanning import plain_tokens
from diglot.sums import running_sums
from diglot.vocabulary import Vocabulary

STOP, ENDED = 256, 257  # columns of a summary after those of the 256 bytes
_FAINT = 1e-7  # prefixes of less mass are summed token by token: running sums have an error of about 1e-14


@dataclass(frozen=True)
class SidePlan:
    """One side's queries, and which of them each compared byte reads."""

    first: Tensor  # int64 [N + 1] query of each token after 0 bytes; those after 1, 2 ... bytes follow
    node: Tensor  # int64 [Q] node of the written bytes in the vocabulary's trie; 0 before the first
    begins: Tensor  # int64 [I] query of a token that begins at this byte, or -1
    goes_on: Tensor  # int64 [I] query of the token that is under way, or may have just ended; or -1
    token: Tensor  # int64 [Q] the token of each query
    host_first: Ints  # `first` as numpy, wherever that is
    children: Ints  # [Q + 1] how many next bytes the queries before have together, as numpy

    def to(self, device: torch.device | str) -> SidePlan:
        """The same on `device`."""
        return sent_record(self, device)


@dataclass(frozen=True)
class BytePlan:
    """Both sides' queries for the same bytes, in order of segment and position."""

    student: SidePlan
    teacher: SidePlan
    items: int
    segment: Tensor  # int64 [I]
    position: Tensor  # int64 [I] in the segment; its length for stop
    anchored: bool = True  # does the student's own cut count?

    def to(self, device: torch.device | str) -> BytePlan:
        """The same on `device`."""
        places = sent(self.segment, device), sent(self.position, device)
        return BytePlan(self.student.to(device), self.teacher.to(device), self.items, *places, self.anchored)


class ByteDistribution(SummaryObjective):
    """Generalised JSD between the two next-byte distributions, in nats per byte, plus a segmentation anchor on the
    student.

    Distribution at a byte that begins a token, with `e` the mass of the token before as it was written and `l(b)`
    that of longer tokens which go on with `b`: `(e * p_first(b) + l(b)) / (e + sum l)`. Inside a token: `l(b) / sum
    l`. Both are exact given that the text before was cut as written, with one token under way; the exact distribution
    sums over all cuts.

    The divergence is zero if and only if the distributions agree at every byte of the text. It is symmetric in the two
    tokenizers and leaves the student free to cut text in any way, so alone it lets canonical likelihood decay. `anchor`
    times the student's surprisal of its own cut comes on top: with it, `-log p(token)` splits into `-log` of the byte
    distribution and this part, without the content. It asks nothing of the teacher, and is not zero where the
    distributions agree. It is left out of the student's own samples: there it is a score function, whose expected
    gradient is zero (but for what a limit of length cuts off), and all that it adds is noise.

    Args:
        beta: in [0, 1]; 0 forward KL(teacher || student), 1 reverse KL(student || teacher).
        anchor: weight of the segmentation part of given texts, at least 0.
    """

    name = "byte"

    def __init__(self, pair: Pair, *, beta: float = 0.5, anchor: float = 1.0) -> None:
        super().__init__(pair)
        check_range("beta", beta, 0.0, 1.0)
        if anchor < 0:
            raise ConfigError(f"anchor={anchor} is negative: choose 0 (no segmentation part) or more.")
        self.beta, self.anchor = beta, anchor
        tables = pair.need_tables(self.name)
        self.student = _Columns.of(tables.student, pair.stop_s)
        self.teacher = _Columns.of(tables.teacher, pair.stop_t)

    def plan(self, written: Written) -> BytePlan:
        """The bytes of all exact chunks, and a stop where both sides have one."""
        s, t, at_s, at_t = written.student, written.teacher, self.student.vocabulary, self.teacher.vocabulary
        plain_s = written.usable_s & plain_tokens(s, at_s)
        plain_t = written.usable_t & plain_tokens(t, at_t)
        token = np.repeat(np.arange(len(s.ids)), np.where(plain_s, s.end - s.start, 0))
        offset = np.arange(len(token)) - np.searchsorted(token, token)
        position = s.start[token] + offset
        stride = int(max(s.end.max(initial=0), t.end.max(initial=0))) + 1
        other = np.searchsorted(t.segment * stride + t.end, s.segment[token] * stride + position, side="right")
        shared = other < len(t.ids)
        shared[shared] &= plain_t[other[shared]] & (t.segment[other[shared]] == s.segment[token[shared]])
        token, offset, position, other = token[shared], offset[shared], position[shared], other[shared]
        student = _side_plan(s, plain_s, at_s, token, offset)
        teacher = _side_plan(t, plain_t, at_t, other, position - t.start[other])
        places = torch.from_numpy(s.segment[token].astype(np.int64)), torch.from_numpy(position.astype(np.int64))
        return BytePlan(student, teacher, len(token), *places)

    def summary_s(self, plan: BytePlan) -> Callable[[Tensor, slice], Tensor]:
        return self.student.summary(plan.student)

    def summary_t(self, plan: BytePlan) -> Callable[[Tensor, slice], Tensor]:
        return self.teacher.summary(plan.teacher)

    def loss(self, plan: BytePlan, scores: Scores, share: float) -> tuple[Tensor, Metrics]:
        plan = replace(plan, anchored=not scores.on_policy)
        distributions_t = scores.stored_distributions(plan.segment, plan.position)
        if distributions_t is None:
            return super().loss(plan, scores, share)
        plan = plan.to(scores.device)
        values = self.against(scores.summarised_student(self.summary_s(plan)), distributions_t, plan)
        return share * values.loss.sum(), {"loss": values.loss, **values.metrics}

    def __call__(self, summary_s: Tensor, summary_t: Tensor, plan: BytePlan) -> Values:
        distribution_t, cut_t = byte_distribution(summary_t.detach(), plan.teacher)
        values = self.against(summary_s, distribution_t, plan)
        return Values(values.loss, {**values.metrics, "cut_t": cut_t})

    def against(self, summary_s: Tensor, distribution_t: Tensor, plan: BytePlan) -> Values:
        """The same, where the teacher's next-byte distributions `[items, 257]` are known: kept ones, or mixed ones."""
        distribution_s, cut_s = byte_distribution(summary_s, plan.student)
        divergence = generalized_jsd(smoothed(distribution_s).log(), smoothed(distribution_t).log(), self.beta)
        loss = divergence + self.anchor * cut_s if self.anchor and plan.anchored else divergence
        return Values(loss, {"divergence": divergence.detach(), "cut_s": cut_s.detach()})

    def to(self, device: torch.device | str) -> None:
        super().to(device)
        self.student, self.teacher = self.student.to(device), self.teacher.to(device)


class OwnDistributions:
    """One model's next-byte distributions at all bytes that it wrote or read in plain tokens, with nobody to compare
    it to.

    Args:
        vocabulary: whose length is the width of the logits.
        stop: int64, the ids that end a turn.
    """

    def __init__(self, vocabulary: Vocabulary, stop: Tensor) -> None:
        self.columns = _Columns.of(vocabulary, stop)

    def plan(self, side: WrittenSide) -> tuple[SidePlan, Ints, Ints]:
        """The queries, and segment and position of each distribution, `[I]`."""
        plain = side.exact & plain_tokens(side, self.columns.vocabulary)
        token = np.repeat(np.arange(len(side.ids)), np.where(plain, side.end - side.start, 0))
        offset = np.arange(len(token)) - np.searchsorted(token, token)
        plan = _side_plan(side, plain, self.columns.vocabulary, token, offset)
        return plan, side.segment[token], side.start[token] + offset

    def summary(self, plan: SidePlan) -> Callable[[Tensor, slice], Tensor]:
        """What `byte_distribution` makes distributions of, from logits `[r, V]` of a slice of the tokens."""
        if self.columns.stop.device != plan.first.device:
            self.columns = self.columns.to(plan.first.device)
        return self.columns.summary(plan)


def byte_distribution(summary: Tensor, plan: SidePlan) -> tuple[Tensor, Tensor]:
    """Next-byte distributions, `[I, 257]`, and the surprisal in nats of the written cut at each byte, `[I]`.

    The surprisal of all cuts and of all bytes under their distributions *given the cut* add up to that of the tokens.
    """
    begins, goes_on = (plan.begins >= 0)[:, None], (plan.goes_on >= 0)[:, None]
    first = summary[plan.begins.clamp(min=0), : STOP + 1]
    first = first / log_safe(first.sum(-1, keepdim=True))
    under_way = summary[plan.goes_on.clamp(min=0)]
    longer, ended = under_way[:, :STOP], under_way[:, ENDED:]
    longer = torch.cat([longer, torch.zeros_like(ended)], dim=-1)
    total = longer.sum(-1, keepdim=True)
    mixed = (ended * first + longer) / log_safe(ended + total)
    distribution = torch.where(begins & goes_on, mixed, torch.where(begins, first, longer / log_safe(total)))
    cut = log_mass(ended + total) - log_mass(torch.where(begins, ended, total))
    return distribution, torch.where(goes_on, cut, 0.0).squeeze(-1)


def smoothed(distribution: Tensor) -> Tensor:
    """With `FLOOR` more in every cell, and normalised again.

    Inside a token a byte may have no token to go on with, though one that ended there could: no KL may be infinite.
    """
    return (distribution + FLOOR) / (1 + FLOOR * distribution.shape[-1])


def log_safe(mass: Tensor) -> Tensor:
    """A mass that something may be divided by."""
    return mass.clamp(min=torch.finfo(mass.dtype).tiny)


@dataclass(frozen=True)
class _Columns:
    """A vocabulary's columns in order of their bytes, and its trie."""

    vocabulary: Vocabulary
    stop: Tensor
    sorted_ids: Tensor  # int64 [M]
    low: Tensor  # int64 [P] tokens with this prefix are sorted_ids[low:high]
    high: Tensor  # int64 [P]
    first_child: Tensor  # int64 [P + 1]
    byte: Tensor  # int64 [P] last byte of the prefix

    @classmethod
    def of(cls, vocabulary: Vocabulary, stop: Tensor) -> _Columns:
        """Of a vocabulary and its stop set."""
        trie = vocabulary.trie
        arrays = (trie.sorted_ids, trie.low, trie.high, trie.first_child, trie.byte)
        return cls(vocabulary, stop, *(torch.from_numpy(a).to(stop.device) for a in arrays))

    def to(self, device: torch.device | str) -> _Columns:
        """The same with its tensors on `device`."""
        return _Columns.of(self.vocabulary, self.stop.to(device))

    def summary(self, plan: SidePlan) -> Callable[[Tensor, slice], Tensor]:
        """Masses of the next bytes, of stop, and of "the token ends here", of each query of the rows, `[q, 258]`."""
        return lambda logits, rows: self._masses(logits, rows, plan)

    def _masses(self, logits: Tensor, rows: slice, plan: SidePlan) -> Tensor:
        probs = at_least_float32(logits).softmax(-1)
        begin, end = plan.host_first[[rows.start, rows.start + len(probs)]].tolist()
        node, row = plan.node[begin:end], plan.token[begin:end] - rows.start
        # Sorted by bytes, the tokens that start with a prefix are neighbours: a mass is a difference of running sums.
        running = running_sums(probs.gather(1, self.sorted_ids.expand(len(probs), -1)).double())
        running = nn.functional.pad(running, (1, 0))

        def between(query: Tensor, low: Tensor, high: Tensor) -> Tensor:
            return running[row[query], high] - running[row[query], low]

        children = int(plan.children[end] - plan.children[begin])
        child, parent = ragged(self.first_child[node], self.first_child[node + 1], children)
        every = torch.arange(len(node), device=node.device)
        childless = self.first_child[node] == self.first_child[node + 1]
        longer = torch.where(childless, self.high[node], self.low[self.first_child[node].clamp(max=len(self.low) - 1)])
        out = running.new_zeros(len(node), ENDED + 1)
        out = out.index_put((parent, self.byte[child]), between(parent, self.low[child], self.high[child]))
        low = self.low[node]
        one = probs[row, self.sorted_ids[low.clamp(max=len(self.sorted_ids) - 1)]].double()
        ended = torch.where(longer - low == 1, one, between(every, low, longer))  # a single token's mass as it is
        out = out.index_put((every, torch.full_like(every, ENDED)), ended)
        stop = torch.where(node == 0, probs[:, self.stop].sum(-1).double()[row], 0.0)
        out = out.index_put((every, torch.full_like(every, STOP)), stop)
        return self._sharpened(out, probs, node, row, ~childless).to(probs.dtype)

    def _sharpened(self, out: Tensor, probs: Tensor, node: Tensor, row: Tensor, goes_on: Tensor) -> Tensor:
        """The same where the tokens that go on are so unlikely that running sums would round their masses away, however
        likely it is that one ended: summed one by one."""
        faint = (node > 0) & goes_on & (out.detach()[:, :STOP].sum(-1) < _FAINT)
        query = faint.nonzero()[:, 0]  # the host waits here
        if not len(query):
            return out
        at, owner = ragged(self.low[node[query]], self.high[node[query]])
        token = self.sorted_ids[at]
        begin, length, data = self._table
        depth = self._depth[node[query]][owner]
        place = (begin[token] + depth).clamp(max=len(data) - 1)
        column = torch.where(length[token] > depth, data[place], ENDED)
        masses = probs[row[query][owner], token].double()
        exact = out.new_zeros(len(query), ENDED + 1).index_put((owner, column), masses, accumulate=True)
        return out.index_put((query,), exact)

    @cached_property
    def _table(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where each id's bytes begin, how many they are, and all bytes."""
        v = self.vocabulary
        arrays = (v.offsets[:-1], v.lengths, v.data.astype(np.int64))
        begin, length, data = (torch.from_numpy(a).to(self.stop.device) for a in arrays)
        return begin, length, data

    @cached_property
    def _depth(self) -> Tensor:
        """Bytes of each node's prefix, `[P]`."""
        v, depth = self.vocabulary, np.zeros(len(self.low), dtype=np.int64)
        within = np.arange(len(v.data)) - np.repeat(v.offsets[:-1], v.lengths) + 1
        known = v.trie.node_at >= 0
        depth[v.trie.node_at[known]] = within[known]
        return torch.from_numpy(depth).to(self.stop.device)


def _side_plan(side: WrittenSide, plain: Bools, vocabulary: Vocabulary, token: Ints, offset: Ints) -> SidePlan:
    """Queries of all plain tokens of a side; `token` and `offset` say where each compared byte lies."""
    written = np.where(side.stop, 0, side.end - side.start)
    queries = np.where(plain, written + 1, 0)
    first = np.concatenate([[0], np.cumsum(queries)])
    owner = np.repeat(np.arange(len(queries)), queries)
    read = np.arange(len(owner)) - first[owner]
    trie = vocabulary.trie
    at = vocabulary.offsets[side.ids[owner]] + read - 1
    node = np.where(read > 0, trie.node_at[np.maximum(at, 0)], 0)
    before = token - 1
    follows = (before >= 0) & (side.segment[before] == side.segment[token]) & plain[before]
    begins = np.where(offset == 0, first[token], -1)
    after = np.where(follows, first[before] + written[before], -1)
    goes_on = np.where(offset > 0, first[token] + offset, after)
    children = np.concatenate([[0], np.cumsum(np.diff(trie.first_child)[node])])
    first_query, at_node, begins_at, goes_on_at, of_token = map(torch.from_numpy, (first, node, begins, goes_on, owner))
    return SidePlan(first_query, at_node, begins_at, goes_on_at, of_token, first, children)
