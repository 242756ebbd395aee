"""Byte-prefix marginal: the teacher's distribution over the student's next token, at every student row.

For every teacher token that may come next, the student's next token is the longest one that its bytes start with.
Inside a teacher token only those are left that start with the bytes already written, and what counts is the rest of
them. Where a student token runs past the end of the written teacher token, its mass comes from the teacher's later
rows, along the text that was written. (BPM, arXiv 2607.22334. There for byte-level BPE; here the maps are over byte
tables of any kind.)

Shapes: `R` rows, `K` candidates of a row that run past the teacher's token, `E` entries of all prefix ranges.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diglot.arrays import Bools, Ints
from diglot.batches import Written
from diglot.batches.sending import sent_together
from diglot.errors import ConfigError
from diglot.objectives.base import RowObjective, at_least_float32, check_range
from diglot.objectives.divergences import forward_kl, generalized_jsd
from diglot.objectives.masses import FLOOR, gathered, log_mass, ragged
from diglot.objectives.pair import Pair
from diglot.objectives.scores import Rows, Scores, Values
from diglot.objectives.spanning import Spanning, plain_tokens, prefix_range, spanning
from diglot.sums import running_sums
from diglot.vocabulary import Vocabulary
from diglot.vocabulary.maps import first_tokens, greedy_tokens


class BPM(RowObjective):
    """Generalised JSD between the byte-prefix marginal `t` of the teacher and the student's distribution `p`, in
    nats per row.

    `t(v) = sum of q(u) over teacher tokens u whose bytes map to v`. Cells: the student's tokens that some teacher token
    maps to, stop, and one for everything else on both sides. `beta=0` is the forward KL(t || p) of the paper, `beta=1`
    the reverse; there cells without target mass count as 1e-8, since `t` only bounds the true marginal from below.

    Zero if and only if `p = t`. That is the teacher's distribution over student tokens up to three things: the
    longest prefix need not be what the student's tokenizer gives (`first_token="encode"` asks it); past the written
    teacher token only the written continuation is followed; both read one tokenization of the text before. With equal
    vocabularies `t = q` and the value is the JSD of the two distributions with control ids in one cell and stop ids
    in another.

    Args:
        beta: in [0, 1].
        first_token: "greedy", or "encode": the first token of the student's own encoding of the teacher token.
        skip_blank: leave out rows whose written student token is spaces and tabs only. Such rows teach the teacher's
            way of cutting indentation, which the student cannot keep up (section 5 of the paper). They are counted.
        stop: compare the mass of stop. Without it, stop ids are part of the cell for everything else.
    """

    name = "bpm"

    def __init__(
        self, pair: Pair, *, beta: float = 0.0, first_token: str = "greedy", skip_blank: bool = True, stop: bool = True
    ) -> None:
        super().__init__(pair)
        check_range("beta", beta, 0.0, 1.0)
        if first_token not in ("greedy", "encode"):
            raise ConfigError(f"first_token={first_token!r} is not known: choose 'greedy' or 'encode'.")
        self.beta, self.skip_blank, self.stop = beta, skip_blank, stop
        tables = pair.need_tables(self.name)
        student, teacher = tables.student, tables.teacher
        self.student, self.teacher = student, teacher
        self._greedy = greedy_tokens(teacher, student)
        whole = self._greedy[np.minimum(teacher.offsets[:-1], len(self._greedy) - 1)]
        whole = np.where(teacher.lengths > 0, whole, -1)
        if pair.same:
            whole = np.where(teacher.lengths > 0, np.arange(len(teacher)), -1)
        self._differ = np.zeros(len(teacher), dtype=np.bool_)
        if first_token == "encode":
            if tables.spell_s is None:
                raise ConfigError("first_token='encode' needs the student's tokenizer: use Pair.of(..., spell_s=...).")
            greedy, whole = whole, first_tokens(teacher, student, tables.spell_s)
            self._differ = greedy != whole
        self._blank = blank_tokens(student)
        self.none = len(student) + 1  # columns of the cells: tokens, stop, none
        self.column_of = torch.from_numpy(_with_stop(whole, pair.stop_t.numpy() if stop else None, len(student)))
        self.image = torch.zeros(len(student), dtype=torch.bool).index_fill(
            0, torch.from_numpy(whole[whole >= 0]), True
        )
        self._suffix, self._column = np.where(self._greedy >= 0, self._greedy, self.none), self.column_of.numpy()
        self.suffix_column = torch.from_numpy(self._suffix)
        self._place = np.full(len(teacher), -1)
        self._place[teacher.trie.sorted_ids] = np.arange(len(teacher.trie.sorted_ids))
        self.sorted_t = torch.from_numpy(teacher.trie.sorted_ids)
        self.begin_t, self.length_t = torch.from_numpy(teacher.offsets[:-1]), torch.from_numpy(teacher.lengths)
        self.differ = torch.from_numpy(self._differ)

    # ---- which rows --------------------------------------------------------------------------------------------

    def rows(self, written: Written) -> Rows:
        """Every student token of an exact chunk, with the teacher token that it starts in."""
        s, t, alignment = written.student, written.teacher, written.alignment
        j = alignment.teacher_at
        known = written.usable_s & (j >= 0) & plain_tokens(s, self.student)
        if len(t.ids):
            known &= plain_tokens(t, self.teacher)[j] & (alignment.chunk_t[j] == alignment.chunk_s)
        if not self.stop:
            known &= ~s.stop
        blank = known & self._blank[s.ids] & ~s.stop if self.skip_blank else np.zeros_like(known)
        i = np.flatnonzero(known & ~blank)
        j = j[i]
        inside = s.start[i] - t.start[j]
        low, high = prefix_range(self.teacher, t.ids[j], inside)
        arrays = {"inside": inside, "low": low, "high": high}
        tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
        return Rows(torch.from_numpy(i), torch.from_numpy(j), tensors, skipped={"blank": int(blank.sum())})

    def extra(self, rows: Rows, written: Written, scores: Scores) -> dict[str, Tensor]:
        """Where mass moves to tokens that run past the written teacher token: columns and differences, `[R, K + 1]`.

        And, on the host, how many teacher tokens each row's prefix range holds.
        """
        host, device = rows.on_host, rows.student.device
        i, j = host.student.numpy(), host.teacher.numpy()
        entries = (host.inputs["high"] - host.inputs["low"]).clamp(min=0)
        spans = spanning(written, i, j, self.student, self.teacher)
        width = int(spans.place.max(initial=-1)) + 2
        column = np.full((len(i), width), self.none)
        column[spans.row, spans.place + 1] = spans.token
        column[:, 0] = self._head(written, i, j)
        at = spans.row, spans.place, column
        row, place, columns = sent_together([torch.from_numpy(x) for x in at], device)
        mass = torch.zeros(len(i), width, dtype=torch.float32, device=device)
        if not len(row):
            return {"span_column": columns[:, :0], "span_mass": mass[:, :0], "entries": entries}
        longer = torch.zeros_like(mass)
        longer[row, place] = self._reach(written, j, spans, scores).to(device)  # P_1 >= P_2 >= ..., 0 after the last
        mass[:, 1:] = longer[:, :-1] - longer[:, 1:]
        mass[:, 0] = -longer[:, 0]
        return {"span_column": columns, "span_mass": mass, "entries": entries}

    def _reach(self, written: Written, j: Ints, spans: Spanning, scores: Scores) -> Tensor:
        """The teacher's mass on the texts that the candidates cover, from the start of token `j` on, float32 `[Q]`."""
        whole = spans.whole
        alone = self._place[written.teacher.ids[whole]]  # a token alone is a range too: one pass finds both
        low, high = np.concatenate([alone, spans.tail[0]]), np.concatenate([alone + 1, spans.tail[1]])
        token = np.concatenate([whole, spans.last])
        logp = scores.teacher_ranges(*map(torch.from_numpy, (token, low, high))).double()
        at = whole + 1, spans.last, j[spans.row]
        known, last, first = sent_together([torch.from_numpy(x) for x in at], logp.device)
        each = logp.new_zeros(len(written.teacher.ids) + 1).index_copy(0, known, logp[: len(whole)])
        before = running_sums(each, overwrite=True)
        return (before[last] - before[first] + logp[len(whole) :]).exp().float()

    def _head(self, written: Written, i: Ints, j: Ints) -> Ints:
        """The column that the written teacher token itself maps to, `[R]`."""
        t, inside = written.teacher, written.student.start[i] - written.teacher.start[j]
        at = np.minimum(self.teacher.offsets[t.ids[j]] + inside, len(self._greedy) - 1)
        return np.where(inside > 0, self._suffix[at], self._column[t.ids[j]])

    # ---- the two distributions ---------------------------------------------------------------------------------

    def target(self, logits_t: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """`t` over student tokens, stop and none, `[R, V_s + 2]`; which columns can be reached; metrics `[R]`."""
        probs = at_least_float32(logits_t).softmax(-1)
        whole = inputs["inside"] == 0
        target = gathered(probs, self.column_of, self.none + 1).mul_(whole[:, None])
        reached = torch.cat([self.image.expand(len(probs), -1), whole.new_ones(len(probs), 2)], dim=-1)
        reached[:, :-1] &= whole[:, None]
        entries = inputs.get("entries")
        at, row = ragged(inputs["low"], inputs["high"], None if entries is None else int(entries.sum()))
        token, inside = self.sorted_t[at], inputs["inside"][row]
        goes_on = self.length_t[token] > inside  # one that ended at the prefix adds nothing to a cell that is reached
        suffix = (self.begin_t[token] + inside).clamp(max=len(self.suffix_column) - 1)
        flat = row * target.shape[1] + torch.where(goes_on, self.suffix_column[suffix], self.none)
        target.view(-1).index_add_(0, flat, probs.view(-1)[row * probs.shape[1] + token] * goes_on)
        reached.view(-1).index_fill_(0, flat, True)
        moved = torch.zeros_like(target[:, 0])
        if inputs["span_column"].shape[1]:
            mass = inputs["span_mass"].to(target.dtype)
            target.scatter_add_(1, inputs["span_column"], mass).clamp_(min=0)
            reached.scatter_(1, inputs["span_column"], reached.gather(1, inputs["span_column"]) | (mass > 0))
            moved = -mass[:, 0]
        total = target.sum(-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
        differing = (probs @ self.differ.to(probs.dtype)) * whole
        return target.div_(total), reached, {"spanned": moved / total[:, 0], "maps_differ": differing}

    def cells(self, logits_s: Tensor, reached: Tensor) -> Tensor:
        """Log-probabilities of the student over the same cells, `[R, V_s + 2]`; -inf in those that are not reached."""
        logits, tokens = at_least_float32(logits_s), reached[:, :-2]
        if self.stop:
            tokens = tokens.index_fill(-1, self.pair.stop_s, False)
        logp: Tensor = _Cells.apply(logits, tokens, self.pair.stop_s if self.stop else self.pair.stop_s[:0])
        return logp

    def __call__(self, logits_s: Tensor, logits_t: Tensor, **inputs: Tensor) -> Values:
        with torch.no_grad():
            target, reached, metrics = self.target(logits_t, **inputs)
        logp = self.cells(logits_s, reached)
        if self.beta == 0:
            loss = forward_kl(target, logp)
        else:
            logt = torch.where(target > 0, log_mass(target), -math.inf)
            logt = torch.where(logp > -math.inf, logt.clamp(min=math.log(FLOOR)), logt)
            loss = generalized_jsd(logp, logt, self.beta)
        metrics |= {"none_t": target[:, -1], "none_s": logp[:, -1].detach().exp()}
        return Values(loss, metrics)


class _Cells(torch.autograd.Function):
    """Logits `[R, V]` to log-probs of the cells: the columns of `tokens`, `stops` together, all others together.

    Written out because autograd keeps, fills and reads a dozen matrices of the size of the logits for it.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, stops: Tensor) -> Tensor:
        total, stop = (x.logsumexp(-1, keepdim=True) for x in (logits, logits[:, stops]))
        others = _Cells._others(logits, tokens, stops).logsumexp(-1, keepdim=True)
        ctx.save_for_backward(logits, tokens, stops, total, stop, others)
        cells = torch.cat([logits, stop, others], dim=-1).sub_(total)
        cells[:, :-2].masked_fill_(~tokens, -math.inf)
        return cells

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_cells: Tensor) -> tuple[Tensor, None, None]:
        logits, tokens, stops, total, stop, others = ctx.saved_tensors
        of_own, of_stop, of_others = of_cells[:, :-2].masked_fill(~tokens, 0.0), of_cells[:, -2:-1], of_cells[:, -1:]
        # Each column's share of its cell, not of the whole distribution: the cell of the others may have no mass to
        # speak of.
        of_total = of_own.sum(-1, keepdim=True) + of_stop + of_others
        of_logits = (logits - torch.where(tokens, total, others)).exp_()
        of_logits.mul_(torch.where(tokens, -of_total, of_others - (others - total).exp() * of_total)).add_(of_own)
        if len(stops):
            of_logits[:, stops] = (logits[:, stops] - stop).exp() * (of_stop - (stop - total).exp() * of_total)
        return of_logits, None, None

    @staticmethod
    def _others(logits: Tensor, tokens: Tensor, stops: Tensor) -> Tensor:
        return logits.masked_fill(tokens, -math.inf).index_fill_(-1, stops, -math.inf)


def _with_stop(column: Ints, stop: Ints | None, size_s: int) -> Ints:
    """Map of teacher ids to cells: student tokens, `size_s` for stop, `size_s + 1` for none."""
    cells = np.where(column >= 0, column, size_s + 1)
    if stop is not None:
        cells[stop] = size_s
    return cells


def blank_tokens(vocabulary: Vocabulary) -> Bools:
    """Which tokens are spaces and tabs only, `[V]`."""
    blanks = np.isin(vocabulary.data, np.frombuffer(b" \t", dtype=np.uint8))
    count = np.concatenate([[0], np.cumsum(blanks)])
    blank: Bools = (vocabulary.lengths > 0) & (np.diff(count[vocabulary.offsets]) == vocabulary.lengths)
    return blank
