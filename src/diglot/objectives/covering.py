"""The covering distribution: what the teacher expects next *given the text so far*, at every student token.

After "2" a teacher that reads "23" as one token has a boundary only if the number ended, so its row there says "no
digit follows" with certainty, and a student that is compared at such rows alone learns to end its numbers. What it
means is a mixture: the token "2" ended here, with its mass, or a longer one goes on, with theirs. The mixture is over
all tokens that cover the last bytes of the text (Phan et al., arXiv 2410.09303; Vieira et al., arXiv 2412.03719), and
depends on the past alone: where the whole text's reading has no row, the teacher is asked about the text so far.

Shapes: `R` rows, `C` cells of a row.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diglot.batches import Written
from diglot.batches.sending import sent
from diglot.errors import ConfigError
from diglot.objectives.base import PairObjective, at_least_float32, check_range
from diglot.objectives.cell_masses import CellColumns, CellMasses
from diglot.objectives.covering_ahead import Cuts, TeacherText
from diglot.objectives.covering_cells import CellMap, Neighbours, Probes, Seams
from diglot.objectives.covering_inner import with_inner
from diglot.objectives.covering_plan import CoveringPlan, plan_covering
from diglot.objectives.covering_rows import NEGLIGIBLE, NO_PAIRS, NONE, RowsRead, Table, read_rows
from diglot.objectives.covering_target import Targets, TeacherRows, make_targets
from diglot.objectives.divergences import generalized_jsd
from diglot.objectives.levels import Level
from diglot.objectives.masses import FLOOR, no_text
from diglot.objectives.pair import Pair
from diglot.objectives.scores import Metrics, Rows, Scores, Values
from diglot.objectives.tail import TailTokens

Ints = NDArray[np.int64]
_EXPLAINED = "gain"  # log q - log p of the cell of the written token: a value of each row, and no metric


class Covering(PairObjective):
    """Generalised JSD between the teacher's covering distribution and the student's, in nats per student token.

    Cells of a row: the student tokens that begin the teacher's likeliest continuations, each with the longer tokens
    that the teacher would begin alike; the written token apart where it shares its cell; stop; control tokens that do
    not stop; and the rest. What the student's tokenizer would not have written behind the token before gets no mass.
    Zero, with zero gradient, for a student with the teacher's distribution over texts, up to what docs/objectives.md
    names.

    Args:
        beta: in [0, 1]; 0 forward KL(teacher || student), 1 reverse KL(student || teacher).
        top_k: how many continuations of a row are told apart, those of the teacher's `top_k` likeliest tokens; the
            others are one cell on both sides. At least 1.
        canonical: leave out of the target what the student's tokenizer would have cut in another way.
        written_apart: take the written token out of a cell that it shares. False: the cells depend on the past alone,
            as a control variate of a policy gradient needs (`is_single_step`); inside a cell nothing is compared.
    """

    name = "covering"
    needs = Level.HIDDEN

    def __init__(
        self, pair: Pair, *, beta: float = 0.5, top_k: int = 64, canonical: bool = True, written_apart: bool = True
    ) -> None:
        super().__init__(pair)
        check_range("beta", beta, 0.0, 1.0)
        if top_k < 1:
            raise ConfigError(f"top_k={top_k} of objective 'covering' leaves nothing to compare: choose at least 1.")
        tables = pair.need_tables(self.name)
        if tables.spell_s is None or tables.spell_t is None:
            raise ConfigError("objective 'covering' needs both tokenizers: use Pair.of with spell_s and spell_t.")
        self.beta, self.top_k, self.canonical, self.written_apart = beta, top_k, canonical, written_apart
        self.student, self.teacher, self.spell_t = tables.student, tables.teacher, tables.spell_t
        self.cells = CellMap(tables.student, tables.teacher, tables.spell_s, tables.spell_t)
        self.cuts = Cuts(
            self.cells,
            Probes(self.cells, tables.spell_s, tables.spell_t),
            Neighbours(tables.student, tables.spell_s),
            Seams(self.cells, tables.spell_s),
        )
        self.columns = CellColumns.of(self.cells.cell)
        order = torch.from_numpy(tables.teacher.trie.sorted_ids)
        self.silent_s, silent_t = no_text(pair)
        self._is_control = np.isin(np.arange(len(tables.student)), self.silent_s.numpy())
        self.table = Table(self.pair.stop_t, silent_t, order, top_k)

    def to(self, device: torch.device | str) -> None:
        super().to(device)
        self.table, self.columns = self.table.to(device), self.columns.to(device)

    def plan(self, written: Written) -> CoveringPlan:
        return plan_covering(written, self.student, self.teacher, self.spell_t)

    def targets(self, plan: CoveringPlan, scores: Scores) -> Targets:
        """The teacher's side, constant."""
        written = scores.written
        t = written.teacher
        count, num_prefixes = len(t.ids), len(plan.prefixes.row)
        row = np.concatenate([np.arange(count), plan.branch.row, plan.prefixes.row])
        token = np.concatenate([t.ids, plan.branch.ids, plan.prefixes.token])
        behind = scores.teacher_behind(plan.branch)
        hidden = torch.cat([scores.hidden_t, behind])
        read = read_rows(scores.teacher_log_probs(hidden), row, token, plan.earlier, 0, self.table)
        text = np.where(t.stop, read.stop[:count], read.single[:count])
        rows = TeacherRows(text, read.single[count : len(row) - num_prefixes], read)
        prefix = read.single[len(row) - num_prefixes :]

        plan, rows = with_inner(plan, rows, prefix, scores, self.teacher, self.spell_t, self.table)

        def look(tail: TailTokens) -> RowsRead:
            log_probs = scores.teacher_log_probs(scores.teacher_behind(tail))
            return read_rows(log_probs, NONE, NONE, NO_PAIRS, 0, self.table)

        return make_targets(
            plan,
            rows,
            self.cuts,
            look,
            written.student.ids,
            TeacherText(t.ids, t.segment),
            self.canonical,
        )

    def _known_targets(self, plan: CoveringPlan, scores: Scores) -> Targets:
        return scores.once(self, lambda: self.targets(plan, scores))

    @property
    def is_single_step(self) -> bool:
        return self.beta == 1 and not self.written_apart

    def explained(self, plan: CoveringPlan, scores: Scores) -> Tensor:
        student, _, values = self._compared(plan, scores, self._known_targets(plan, scores), 0.0)
        gain = values.metrics[_EXPLAINED]
        explained = torch.full((len(scores.written.student.ids),), math.nan, dtype=gain.dtype, device=gain.device)
        explained[student] = gain
        return explained

    def _compared(
        self, plan: CoveringPlan, scores: Scores, targets: Targets, share: float
    ) -> tuple[Tensor, Tensor, Values]:
        device = scores.device
        student = sent(torch.from_numpy(plan.student), device)
        inputs = self.row_inputs(plan, targets, scores.written, device)
        return student, *scores.rows(self, Rows(student, student), inputs, share, with_teacher=False)

    def loss(self, plan: CoveringPlan, scores: Scores, share: float) -> tuple[Tensor, Metrics]:
        targets = self._known_targets(plan, scores)
        _, loss, values = self._compared(plan, scores, targets, share)
        skipped = {
            f"skipped_{why}": torch.cat([torch.ones(n), torch.zeros(plan.items)]) for why, n in plan.skipped.items()
        }
        about = {
            "canonical": torch.from_numpy(targets.canonical),
            "longer": torch.from_numpy(targets.longer),
            "branches": torch.from_numpy(plan.last >= 0).double(),
        }
        compared = {name: value for name, value in values.metrics.items() if name != _EXPLAINED}
        return loss, {"loss": values.loss, **compared, **about, **skipped}

    def row_inputs(
        self, plan: CoveringPlan, targets: Targets, written: Written, device: torch.device
    ) -> dict[str, Tensor]:
        """What the comparison reads of each row beside the student's logits, `[R, ...]`."""
        ids, stop = written.student.ids[plan.student], written.student.stop[plan.student]
        split = targets.own if self.written_apart else np.full_like(targets.own, -1)
        host = {
            "column": targets.column,
            "mass": targets.mass.astype(np.float32),
            "stop": targets.stop.astype(np.float32),
            "silent": targets.silent.astype(np.float32),
            "split": split,
            "split_mass": np.where(split >= 0, targets.own_mass, 0.0).astype(np.float32),
            "written": ids,
            "place": self._place(targets, ids, split, stop),
        }
        return {name: sent(torch.from_numpy(values), device) for name, values in host.items()}

    def _place(self, targets: Targets, written: Ints, split: Ints, stop: NDArray[np.bool_]) -> Ints:
        """Which of the values that are compared is the written token's, `[R]`: a column, or one of those behind."""
        columns, cell = targets.column.shape[1], self.cells.cell[written]
        here = (targets.column == cell[:, None]) & (cell >= 0)[:, None]
        place = np.full(len(written), columns + 3, dtype=np.int64)
        if columns:
            place = np.where(here.any(1), here.argmax(1), place)
        place = np.where(split >= 0, columns, place)
        place = np.where(self._is_control[written], columns + 2, place)
        return np.where(stop, columns + 1, place)

    def __call__(self, logits_s: Tensor, logits_t: Tensor | None, **inputs: Tensor) -> Values:
        """Values `[R]` of the student's logits `[R, V_s]` against what is given of the same rows."""
        column, split, sets = inputs["column"], inputs["split"], (self.pair.stop_s, self.silent_s)
        logits = at_least_float32(logits_s)
        of_student, single, stop_s, silent_s = CellMasses.apply(logits, self.columns, column, inputs["written"], *sets)
        dtype = logits.dtype
        of_teacher, own_s = inputs["mass"].to(dtype), single * (split >= 0)
        own_t = inputs["split_mass"].to(dtype)
        at = split.clamp(min=0)[:, None]
        if column.shape[1]:
            of_student = of_student.scatter_add(1, at, -own_s[:, None])
            of_teacher = of_teacher.scatter_add(1, at, -own_t[:, None])
        stop_t = inputs["stop"].to(dtype)
        silent_t = inputs["silent"].to(dtype) * bool(len(self.silent_s))  # part of the rest where no token is its
        rest_s = 1 - of_student.sum(-1) - stop_s - own_s - silent_s
        rest_t = 1 - of_teacher.sum(-1) - stop_t - own_t - silent_t
        if not self.written_apart:  # a difference of sums, whose rounding must not tell texts of one past apart
            rest_t = rest_t.clamp(min=NEGLIGIBLE)
        cells_s, cells_t = (
            torch.cat([known, torch.stack(others, -1)], -1).clamp(min=FLOOR).log()
            for known, others in (
                (of_student, (own_s, stop_s, silent_s, rest_s)),
                (of_teacher, (own_t, stop_t, silent_t, rest_t)),
            )
        )
        at_written = inputs["place"][:, None]
        gain = (cells_t.gather(1, at_written) - cells_s.detach().gather(1, at_written))[:, 0]
        metrics = {"rest_s": rest_s.detach(), "rest_t": rest_t, "control_s": silent_s.detach(), "control_t": silent_t}
        return Values(generalized_jsd(cells_s, cells_t, self.beta), {**metrics, _EXPLAINED: gain})
