"""Weighted sums of row objectives, and their gradients, from blocks of logits that never all exist at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diglot.errors import ConfigError
from diglot.heads.head import Head
from diglot.heads.pullback import HeadGradient
from diglot.objectives.base import ColumnObjective
from diglot.objectives.scores import Values

RowFunction = Callable[..., Values]
Inputs = Mapping[str, Tensor]
PartFunction = Callable[[Tensor, Inputs, slice], Values]  # of the student's raw logits of some rows of a block: which

_CPU_BUDGET = 512 * 2**20
_MASS_ROWS = 16  # rows of a block on which the teacher's mass of chosen columns is measured
_CUDA_SHARE = 8  # one part in so many of the free memory
_PARTS = 8  # of a block
_COPIES_FEW = 4  # the student's logits, a copy of the shared columns, and what finds the largest
_BLOCK_S, _BLOCK_T = 1, 1  # float32 rows of each side that a block holds: logits, replaced by their gradient
_PART_S, _PART_T = 8, 5  # the same of a part, at the peak of a full-vocabulary JSD and its gradient


def default_chunk_rows(
    vocab_size_s: int, vocab_size_t: int, device: torch.device | str, *, few_columns: bool = False
) -> int:
    """How many rows of logits to form at a time: a multiple of 32 that fits a budget of memory, at least 32.

    The budget is 512 MiB on the CPU, an eighth of the free memory on a CUDA device. Wider blocks are faster: the
    gradient of the head's weight is read and written once per block. What is computed from the logits is computed for
    an eighth of a block at a time, so the block can be that much wider. With `few_columns`, whole rows are formed of
    the student only, and without gradient.
    """
    device = torch.device(device)
    budget = _CPU_BUDGET
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        budget = (free + cached) // _CUDA_SHARE
    whole = _BLOCK_S + _PART_S / _PARTS, _BLOCK_T + _PART_T / _PARTS
    copies_s, copies_t = (_COPIES_FEW, 0) if few_columns else whole
    per_row = 4 * (copies_s * vocab_size_s + copies_t * vocab_size_t)
    return max(int(budget / per_row) // 32, 1) * 32


def reduce_rows(
    objective: RowFunction,
    hidden_s: Tensor,
    head_s: Head,
    hidden_t: Tensor | None,
    head_t: Head,
    rows_s: Tensor,
    rows_t: Tensor,
    weight: Tensor,
    chunk_rows: int,
    temperature: float = 1.0,
    inputs: Inputs | None = None,
) -> tuple[Tensor, Values]:
    """`sum(weight * loss)` over rows, with gradient, and the single rows' values, `[R]`, without.

    The gradient is formed block by block together with the value, so that at most `chunk_rows` rows of logits exist at
    a time; it reaches `hidden_s`, the trainable parameters of `head_s`, and what of `inputs` requires it. It can be
    taken once, not differentiated. Up to rounding the result does not depend on `chunk_rows`. A row of weight 0 has no
    part in sum and gradient.

    A `ColumnObjective` that reads few columns gets those alone: no more than they are formed of the teacher's logits.
    Its metrics are `mass_s` and `mass_t`, the probability of the chosen columns; the teacher's is measured on a few
    rows of each block, since it takes whole rows of logits, and is NaN on the others.

    Args:
        objective: maps logits `[r, V_s]`, `[r, V_t]`, and of each of `inputs` the same rows, to values `[r]`, each of
            its own row alone.
        hidden_s: `[N_s, H_s]`; `rows_s` `[R]` says which of them each row reads.
        hidden_t: `[N_t, H_t]`; `rows_t` `[R]` likewise. Gets no gradient. None: the objective gets None for its logits.
        weight: `[R]`, the factors of the reduction.
        temperature: divides the logits of both sides.
        inputs: more about each row, `[R, ...]`, handed to the objective by name.

    Raises `ConfigError` for row arrays of different lengths or `chunk_rows < 1`.
    """
    _check(rows_s, rows_t, weight, chunk_rows)
    parameters = head_s.parameters
    inputs = inputs or {}
    tensors = (hidden_s, *parameters, *inputs.values()) if torch.is_grad_enabled() else ()
    gradients = _Gradients(hidden_s, head_s, inputs, weight) if any(x.requires_grad for x in tensors) else None
    form: Callable[..., tuple[PartFunction, Tensor | None]] = _whole_rows
    if few := reads_few_columns(objective, head_s, head_t):
        form = _columns
    row_values = _RowValues(len(rows_s))
    for at in blocks(len(rows_s), chunk_rows):
        rows, of_teacher = rows_s[at], None if hidden_t is None else hidden_t[rows_t[at].to(hidden_t.device)]
        of_part, ids = form(objective, hidden_s.detach()[rows], head_s, of_teacher, head_t, temperature)
        cuts = [slice(0, len(rows))] if few else list(parts(len(rows), chunk_rows))
        block = _Block(at, rows, ids, of_part, cuts, {n: value.detach()[at] for n, value in inputs.items()})
        if gradients:
            gradients.add(block, row_values)
        else:
            raw = head_s.raw(hidden_s[rows], ids=ids)
            for part in cuts:
                row_values.add(of_part(raw[part], block.known(part), part))
            del raw
        del of_part, of_teacher, block
    values = row_values.whole()
    # Summed here, not block by block: the rounding of the value then is the same for every block size.
    total = _weighted(values.loss, weight).sum()
    return (total if gradients is None else gradients.attached_to(total)), values


def reads_few_columns(objective: RowFunction, head_s: Head, head_t: Head) -> bool:
    """Will `reduce_rows` form single columns only?"""
    few = isinstance(objective, ColumnObjective) and objective.reads_few
    return few and head_s.is_linear and head_t.is_linear


@torch.no_grad()
def _whole_rows(
    objective: RowFunction, hidden_s: Tensor, head_s: Head, hidden_t: Tensor | None, head_t: Head, temperature: float
) -> tuple[PartFunction, None]:
    """The values of a block as a function of the student's raw logits, in whole rows."""
    raw_t = None if hidden_t is None else head_t.raw(hidden_t).to(hidden_s.device)

    def of_part(raw_s: Tensor, inputs: Inputs, part: slice) -> Values:
        with torch.no_grad():
            logits_t = None if raw_t is None else at_temperature(head_t.finished(raw_t[part]), temperature)
        return objective(at_temperature(head_s.finished(raw_s), temperature), logits_t, **inputs)

    return of_part, None


@torch.no_grad()
def _columns(
    objective: ColumnObjective, hidden_s: Tensor, head_s: Head, hidden_t: Tensor, head_t: Head, temperature: float
) -> tuple[PartFunction, Tensor]:
    """The same of the columns that the objective chooses, and which columns of the student those are."""
    logits_s = at_temperature(head_s(hidden_s), temperature)
    columns_s, columns_t = objective.choose(logits_s)
    mass_s = (logits_s.gather(-1, columns_s).logsumexp(-1) - logits_s.logsumexp(-1)).exp()
    del logits_s
    columns_t = columns_t.to(hidden_t.device)
    chosen_t = at_temperature(head_t.columns(hidden_t, columns_t), temperature)
    some = slice(None, None, max(len(hidden_t) // _MASS_ROWS, 1))
    whole_t = at_temperature(head_t(hidden_t[some]), temperature)
    mass_t = torch.full_like(mass_s, torch.nan)
    mass_t[some] = (chosen_t[some].logsumexp(-1) - whole_t.logsumexp(-1)).exp().to(mass_t)
    del whole_t
    chosen_t = chosen_t.to(hidden_s.device)

    def of_part(raw: Tensor, inputs: Inputs, part: slice) -> Values:
        chosen_s = at_temperature(head_s.finished(raw), temperature)
        masses = {"mass_s": mass_s[part], "mass_t": mass_t[part]}
        return Values(objective.compare(chosen_s, chosen_t[part]), masses)

    return of_part, columns_s


def at_temperature(logits: Tensor, temperature: float) -> Tensor:
    """`logits` divided by `temperature`; themselves at 1."""
    return logits if temperature == 1.0 else logits / temperature


def blocks(rows: int, chunk_rows: int) -> Iterator[slice]:
    """Slices that cover `range(rows)`; a single empty one if there are no rows."""
    return (slice(at, min(at + chunk_rows, rows)) for at in range(0, max(rows, 1), chunk_rows))


def parts(rows: int, chunk_rows: int) -> Iterator[slice]:
    """Slices of the rows of one block, for what takes several times the memory of its logits."""
    return blocks(rows, max(chunk_rows // _PARTS, 1))


@torch.no_grad()
def logits_by_parts(
    hidden: Tensor, head: Head, chunk_rows: int, ids: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of `hidden [N, H]`, and their logits `[r, V]`: an eighth of a block at a time, for what copies them.

    Of the columns `ids` `[k]` only, if given: `[r, k]`. Without gradient; they may be overwritten, and are by the next
    block.
    """
    form, raw = head.raw_rows(ids), None
    for block in blocks(len(hidden), chunk_rows):  # the first is the largest
        raw = form(hidden[block], raw)
        for part in parts(len(raw), chunk_rows):
            yield within(block, part), head.finished(raw[part])


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probs of rows of logits `[r, V]` without gradient.

    A CPU writes over the logits: in new memory it takes three times as long.
    """
    return torch.log_softmax(logits, -1, out=logits if logits.device.type == "cpu" else None)


def within(block: slice, part: slice) -> slice:
    """The rows of a part of a block, among all rows."""
    return slice(block.start + part.start, block.start + part.stop)


def put(gradient: Tensor | None, logits: Tensor) -> bool:
    """Write the gradient in the place of the logits, which were read for the last time; returns if there is one."""
    if gradient is None:
        logits.zero_()
        return False
    logits.copy_(gradient)
    return True


class Joining:
    """Tensors joined along the first dimension, `[N, ...]`, copied and without gradient.

    They come one by one between tensors that are thousands of times as large and soon freed. Kept each by itself they
    would lie scattered among the holes that those leave, and the heap, which cannot give these back, would grow with
    the number of rows. (And a metric may be a column of a block's whole distribution, which it would keep alive.)
    """

    def __init__(self, expected: int) -> None:
        self.expected, self.length = expected, 0
        self.joined: Tensor | None = None

    def add(self, piece: Tensor) -> None:
        """Append a piece."""
        until = self.length + len(piece)
        if self.joined is None or until > len(self.joined):
            larger = piece.detach().new_empty(max(self.expected, 2 * until), *piece.shape[1:])
            if self.joined is not None:
                larger[: self.length] = self.joined[: self.length]
            self.joined = larger
        self.joined[self.length : until] = piece.detach()
        self.length = until

    def whole(self) -> Tensor:
        """All of them."""
        assert self.joined is not None, "nothing was added"
        return self.joined[: self.length]


class _RowValues:
    """The values of all rows, part by part."""

    def __init__(self, rows: int) -> None:
        self.rows, self.loss, self.metrics = rows, Joining(rows), dict[str, Joining]()

    def add(self, values: Values) -> None:
        """Append those of a part."""
        self.loss.add(values.loss)
        for name, metric in values.metrics.items():
            self.metrics.setdefault(name, Joining(self.rows)).add(metric)

    def whole(self) -> Values:
        """Those of all rows."""
        return Values(self.loss.whole(), {name: metric.whole() for name, metric in self.metrics.items()})


@dataclass(frozen=True)
class _Block:
    """Rows whose logits exist together."""

    at: slice  # which of all rows
    rows: Tensor  # of the student's hidden states
    ids: Tensor | None  # the student's columns, if not all
    of_part: PartFunction
    parts: Sequence[slice]
    inputs: Inputs  # without gradient

    def known(self, part: slice) -> dict[str, Tensor]:
        """What is given of the rows of a part."""
        return {name: value[part] for name, value in self.inputs.items()}


class _Gradients:
    """The running gradient of a weighted sum with respect to the student's hidden states, head parameters and more.

    Weights are shares of a window, 1e-5 and less, and multiply the gradient of a row of logits, whose entries are
    probabilities. In float16 little would be left before a loss scale could act. So the largest weight is taken out
    here, and put in where the gradient is attached; sums are of 32 bits or more.
    """

    def __init__(self, hidden: Tensor, head: Head, inputs: Inputs, weight: Tensor) -> None:
        self.hidden, self.head = hidden, HeadGradient(head)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self.hidden_sum = torch.zeros_like(hidden, dtype=wide, requires_grad=False) if hidden.requires_grad else None
        largest = weight.abs().amax() if len(weight) else weight.new_ones(())
        self.scale = torch.where(largest > 0, largest, torch.ones_like(largest))
        self.unit = weight / self.scale
        self.inputs = {name: value for name, value in inputs.items() if value.requires_grad}
        self.of_inputs = {name: torch.zeros_like(value, requires_grad=False) for name, value in self.inputs.items()}

    def add(self, block: _Block, row_values: _RowValues) -> None:
        """Add the gradient of one block, and the values of its parts to `row_values`."""
        raw, way_back = self.head.raw(self.hidden.detach()[block.rows], block.ids)
        any_gradient = False
        for part in block.parts:
            any_gradient |= self._replace(raw, block, part, row_values)
        of_hidden = way_back(raw) if any_gradient else None
        if self.hidden_sum is not None and of_hidden is not None:
            self.hidden_sum.index_add_(0, block.rows, of_hidden.to(self.hidden_sum.dtype))

    def _replace(self, raw: Tensor, block: _Block, part: slice, row_values: _RowValues) -> bool:
        """Put the gradient of a part in the place of its logits; returns if there is one.

        A function of its own, so that nothing of a part outlives it.
        """
        leaf = raw[part].requires_grad_()
        known = {name: value.requires_grad_(name in self.inputs) for name, value in block.known(part).items()}
        with torch.enable_grad():
            values = block.of_part(leaf, known, part)
            total = _weighted(values.loss, self.unit[block.at][part]).sum()
        of_leaf: Tensor | None = None
        if total.requires_grad:
            wanted = [leaf, *(known[name] for name in self.inputs)]
            of_leaf, *of_known = torch.autograd.grad(total, wanted, allow_unused=True)
            for so_far, gradient in zip(self.of_inputs.values(), of_known, strict=True):
                if gradient is not None:
                    so_far[block.at][part].add_(gradient)
        row_values.add(values)
        return put(of_leaf, raw[part])

    def attached_to(self, total: Tensor) -> Tensor:
        """`total` as a node of the graph with these gradients."""
        tensors = (self.hidden, *self.head.parameters, *self.inputs.values())
        attached: Tensor = _Attach.apply(
            total, [self.hidden_sum, *self.head.sums, *self.of_inputs.values()], self.scale, *tensors
        )
        return attached


class _Attach(torch.autograd.Function):
    """A value whose gradient is known already. It is scaled in place and handed over, so it can be taken once."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor | None], scale: Tensor, *inputs: Tensor) -> Tensor:
        ctx.gradients, ctx.scale, ctx.dtypes = gradients, scale, [x.dtype for x in inputs]
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "The gradient of a reduced loss was asked for a second time: it is handed over at the first, and kept "
                "nowhere. Add the losses before `backward`, or compute this one again."
            )
        gradients, ctx.gradients = ctx.gradients, None
        factor = ctx.scale * grad_output  # before anything is rounded to 16 bits
        scaled = (None if g is None else g.mul_(factor.to(g.dtype)) for g in gradients)
        return None, None, None, *(None if g is None else g.to(x) for g, x in zip(scaled, ctx.dtypes, strict=True))


def _weighted(loss: Tensor, weight: Tensor) -> Tensor:
    """`weight * loss`, zero where the weight is, even if the loss is infinite."""
    return (loss * weight.to(loss.dtype)).masked_fill(weight == 0, 0.0)


def _check(rows_s: Tensor, rows_t: Tensor, weight: Tensor, chunk_rows: int) -> None:
    if not len(rows_s) == len(rows_t) == len(weight):
        raise ConfigError(
            f"rows_s, rows_t and weight have {len(rows_s)}, {len(rows_t)} and {len(weight)} entries: pass one of each "
            "per row."
        )
    if chunk_rows < 1:
        raise ConfigError(f"chunk_rows={chunk_rows} forms no row: choose at least 1, or default_chunk_rows(...).")
