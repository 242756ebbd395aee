"""Byte-prefix marginal and, one step deeper, how to complete a teacher token that the student has to write in pieces.

(ESCD, arXiv 2609.34738.) The root is `bpm`. When the student has written the first piece of what the teacher would have
written whole, its next row should go on with the rest of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from diglot.arrays import Ints
from diglot.batches import Written
from diglot.errors import ConfigError
from diglot.objectives.base import at_least_float32
from diglot.objectives.bpm import BPM
from diglot.objectives.masses import log_mass, ragged
from diglot.objectives.pair import Pair
from diglot.objectives.scores import Rows, Scores, Values
from diglot.vocabulary import Vocabulary


class ESCD(BPM):
    """`bpm` at every student row, plus the completion step at the written children, in nats per root row.

    Child of a row at a teacher boundary: the next student row, after the written token `a`. For each group `g` of
    teacher tokens that begin with `a`, have no student token of their own, and begin with one another: `-M_g log C_g`,
    with `M_g` the teacher's mass of the group at the root, and `C_g` the student's mass, at the child, of tokens that
    begin with what is left of the group's shortest token. (The paper also scores children that were not written, which
    takes another forward pass of the student for each.)

    The child's value is a cross-entropy: its gradient is right, its size is not zero where the distributions agree,
    and no part of it says what the student should do with the mass that is in no group.
    """

    name = "escd"

    def __init__(
        self,
        pair: Pair,
        *,
        child_weight: float = 1.0,
        beta: float = 0.0,
        first_token: str = "greedy",
        skip_blank: bool = True,
        stop: bool = True,
    ) -> None:
        super().__init__(pair, beta=beta, first_token=first_token, skip_blank=skip_blank, stop=stop)
        if not child_weight >= 0:
            raise ConfigError(f"child_weight={child_weight} is negative: choose 0 (root rows alone) or more.")
        self.child_weight = child_weight
        tables = pair.need_tables(self.name)
        groups = completion_groups(tables.teacher, tables.student, self._greedy)
        self._groups_of = groups.first  # numpy: groups of each student token
        self._sizes = np.stack([np.diff(groups.member_first), groups.high - groups.low])  # [2, G] members, completions
        self.members = torch.from_numpy(groups.members)
        self.member_first = torch.from_numpy(groups.member_first)
        self.rest_low, self.rest_high = torch.from_numpy(groups.low), torch.from_numpy(groups.high)
        self.sorted_s = torch.from_numpy(tables.student.trie.sorted_ids)

    def rows(self, written: Written) -> Rows:
        """The rows of `bpm`, then the children: student rows one later, teacher rows of the root."""
        root = super().rows(written)
        i, j = root.student.numpy(), root.teacher.numpy()
        s = written.student
        token = s.ids[i]
        child = np.minimum(i + 1, len(s.ids) - 1)
        has = (root.inputs["inside"].numpy() == 0) & ~s.stop[i] & (child > i) & (s.segment[child] == s.segment[i])
        has &= written.usable_s[child]
        has &= self._groups_of[token + 1] > self._groups_of[token]
        parents = np.flatnonzero(has)
        low, high = self._groups_of[token[parents]], self._groups_of[token[parents] + 1]
        inputs = {name: torch.cat([value, value.new_zeros(len(parents))]) for name, value in root.inputs.items()}
        for name, of_child in (("group_low", low), ("group_high", high)):
            inputs[name] = torch.from_numpy(np.concatenate([np.zeros(len(i), np.int64), of_child]))
        student = torch.from_numpy(np.concatenate([i, child[parents]]))
        teacher = torch.from_numpy(np.concatenate([j, j[parents]]))
        return Rows(student, teacher, inputs, count=len(i), skipped=root.skipped)

    def extra(self, rows: Rows, written: Written, scores: Scores) -> dict[str, Tensor]:
        """What `bpm` asks of the roots; of the children, on the host, that they are some and what their groups hold."""
        roots, host = rows.items, rows.on_host
        of_roots = super().extra(replace(_first(rows, roots), planned=_first(host, roots)), written, scores)
        children = len(rows.student) - roots
        column, mass, entries = of_roots["span_column"], of_roots["span_mass"], of_roots["entries"]
        low, high = host.inputs["group_low"].numpy(), host.inputs["group_high"].numpy()
        before = np.pad(np.cumsum(self._sizes, axis=1), ((0, 0), (1, 0)))
        held = np.stack([high - low, *(before[:, high] - before[:, low])], axis=-1)
        return {
            "span_column": torch.cat([column, column.new_full((children, column.shape[1]), self.none)]),
            "span_mass": torch.cat([mass, mass.new_zeros(children, mass.shape[1])]),
            "entries": torch.cat([entries, entries.new_zeros(children)]),
            "child": torch.arange(len(rows.student)) >= roots,
            "held": torch.from_numpy(held),
        }

    def __call__(self, logits_s: Tensor, logits_t: Tensor, **inputs: Tensor) -> Values:
        child, held = inputs.pop("child"), inputs.pop("held")
        roots = len(child) - int(child.sum())  # the children stand behind them
        root = super().__call__(logits_s[:roots], logits_t[:roots], **{k: v[:roots] for k, v in inputs.items()})
        low, high = inputs["group_low"][roots:], inputs["group_high"][roots:]
        completion, mass = self.completion(logits_s[roots:], logits_t[roots:], low, high, held[roots:])
        of_root, of_child = (x.new_full((n,), torch.nan) for x, n in ((root.loss.detach(), roots), (mass, len(mass))))
        metrics = {name: torch.cat([value, of_child.to(value)]) for name, value in root.metrics.items()}
        metrics["completion_mass"] = torch.cat([of_root.to(mass), mass])
        return Values(torch.cat([root.loss, self.child_weight * completion]), metrics)

    def completion(
        self, logits_s: Tensor, logits_t: Tensor, low: Tensor, high: Tensor, held: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`-sum of M_g log C_g` over the groups `[low, high)` of each row, `[R]`, and the sum of the `M_g`, `[R]`.

        `held`: on the host, how many groups, members and completions each row has, `[R, 3]`.
        """
        groups, members, completions = held.sum(0).tolist()
        group, row = ragged(low, high, groups)
        with torch.no_grad():
            probs_t = at_least_float32(logits_t).softmax(-1)
            member, event = ragged(self.member_first[group], self.member_first[group + 1], members)
            of_members = probs_t[row[event], self.members[member]]
            mass = probs_t.new_zeros(len(group)).index_add(0, event, of_members)
        logits = at_least_float32(logits_s)
        probs_s = logits.softmax(-1)
        at, event = ragged(self.rest_low[group], self.rest_high[group], completions)
        completing = probs_s.view(-1)[row[event] * probs_s.shape[1] + self.sorted_s[at]]
        completed = probs_s.new_zeros(len(group)).index_add(0, event, completing)
        zeros = probs_s.new_zeros(len(logits_s))
        return zeros.index_add(0, row, -mass * log_mass(completed)), mass.new_zeros(len(low)).index_add(0, row, mass)


@dataclass(frozen=True)
class Groups:
    """Teacher tokens without a student token of the same bytes, grouped by first piece and shortest prefix."""

    first: Ints  # [V_s + 1] groups [first[a], first[a + 1]) begin with student token a
    members: Ints  # [M] teacher ids, group by group
    member_first: Ints  # [G + 1] where each group's members begin
    low: Ints  # [G] range of sorted student tokens that begin with what is left
    high: Ints  # [G]


def completion_groups(teacher: Vocabulary, student: Vocabulary, greedy: Ints) -> Groups:
    """Groups of teacher tokens that the student must write in pieces.

    `greedy` is `greedy_tokens(teacher, student)`. A group's representative is its shortest token; what is left of it
    after its first piece must begin some student token, else the group has no completion in one step and is left out.
    """
    ids = np.flatnonzero(teacher.lengths > 0)
    piece = greedy[teacher.offsets[ids]]
    split = (piece >= 0) & (student.lengths[np.maximum(piece, 0)] < teacher.lengths[ids])
    ids, piece = ids[split], piece[split]
    representative = _shortest_prefixes(teacher, ids, piece)
    begin = teacher.offsets[representative] + student.lengths[piece]
    low, high = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
    end = teacher.offsets[representative + 1]
    for on, depth, node in student.trie.walk(teacher.data, begin, end):
        whole = begin[on] + depth == end[on]
        low[on[whole]], high[on[whole]] = student.trie.low[node[whole]], student.trie.high[node[whole]]
    completable = high > low
    ids, piece, representative, low, high = (x[completable] for x in (ids, piece, representative, low, high))
    order = np.lexsort((ids, representative, piece))
    ids, piece, representative, low, high = (x[order] for x in (ids, piece, representative, low, high))
    opens = np.flatnonzero(np.diff(representative, prepend=-1) | np.diff(piece, prepend=-1))
    first = np.searchsorted(piece[opens], np.arange(len(student) + 1))
    return Groups(first, ids, np.append(opens, len(ids)), low[opens], high[opens])


def _shortest_prefixes(vocabulary: Vocabulary, ids: Ints, piece: Ints) -> Ints:
    """For each of `ids` the shortest of them that it begins with and that has the same first piece (maybe itself)."""
    member = np.full(len(vocabulary), -1, dtype=np.int64)
    member[ids] = piece
    best = ids.copy()
    settled = np.zeros(len(ids), dtype=np.bool_)
    trie = vocabulary.trie
    for on, _, node in trie.walk(vocabulary.data, vocabulary.offsets[ids], vocabulary.offsets[ids + 1]):
        token = trie.token[node]
        hit = (token >= 0) & ~settled[on] & (member[token] == piece[on])
        best[on[hit]], settled[on[hit]] = token[hit], True
    return best


def _first(rows: Rows, count: int) -> Rows:
    inputs = {name: value[:count] for name, value in rows.inputs.items()}
    return Rows(rows.student[:count], rows.teacher[:count], inputs)
