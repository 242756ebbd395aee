"""A planted fault makes the named test fail: what the references would not notice, they do not guard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.beside import load_beside

from diglot.objectives import RowObjective, byte, divergences, shared_prefix, spanning
from diglot.objectives.bpm import BPM
from diglot.objectives.byte import ByteDistribution
from diglot.objectives.escd import ESCD
from diglot.objectives.shared_prefix import SharedPrefix

promises, references = (load_beside(__file__, name) for name in ("test_promises", "test_references"))

Patch = Callable[[pytest.MonkeyPatch], None]


def one_row_late(cls: type[RowObjective]) -> Patch:
    """Teacher rows are read one position late, as in the incumbent's default."""
    original = cls.rows

    def late(self: Any, written: Any) -> Any:
        rows = original(self, written)
        last = len(written.teacher.ids) - 1
        return replace(rows, teacher=(rows.teacher + 1).clamp(max=last))

    return lambda patch: patch.setattr(cls, "rows", late)


def swapped_beta(module: Any) -> Patch:
    original = divergences.generalized_jsd
    return lambda patch: patch.setattr(f"{module}.generalized_jsd", lambda s, t, beta: original(s, t, 1 - beta))


def dropped_stop(cls: Any, name: str) -> Patch:
    """The stop set of the teacher is forgotten when its columns are mapped."""
    original = cls.__init__

    def without(self: Any, pair: Any, **options: Any) -> None:
        original(self, pair, **options)
        column = getattr(self, name)
        setattr(self, name, column.index_fill(0, pair.stop_t, int(column[pair.stop_t].max()) + 1 - 2))

    return lambda patch: patch.setattr(cls, "__init__", without)


def shallow_prefix(patch: pytest.MonkeyPatch) -> None:
    """Ranges of one byte less than was written: an off-by-one inside teacher tokens."""
    original = spanning.prefix_range

    def shallow(vocabulary: Any, ids: Any, length: Any) -> Any:
        return original(vocabulary, ids, (length - 1).clip(min=0) + (length == 1))

    for module in ("diglot.objectives.bpm", "diglot.objectives.spanning"):
        patch.setattr(f"{module}.prefix_range", shallow)


def one_node_up(patch: pytest.MonkeyPatch) -> None:
    """Next bytes are read one byte too early: an off-by-one inside tokens."""
    original = byte._side_plan

    def early(*arguments: Any) -> Any:
        plan = original(*arguments)
        return replace(plan, node=torch.where(plan.node > 0, plan.node.roll(1), plan.node))

    patch.setattr(byte, "_side_plan", early)


def no_spanning(patch: pytest.MonkeyPatch) -> None:
    original = BPM.extra

    def none(self: Any, *arguments: Any) -> Any:
        return {name: value[:, :0] for name, value in original(self, *arguments).items()}

    patch.setattr(BPM, "extra", none)


def never_ended(patch: pytest.MonkeyPatch) -> None:
    """At a boundary only the story of a longer token is told."""
    original = byte._side_plan

    def deaf(*arguments: Any) -> Any:
        plan = original(*arguments)
        return replace(plan, begins=torch.where(plan.goes_on >= 0, -1, plan.begins))

    patch.setattr(byte, "_side_plan", deaf)


def always_ended(patch: pytest.MonkeyPatch) -> None:
    """At a boundary the chance that a longer token was under way is forgotten."""
    original = byte._side_plan

    def sure(*arguments: Any) -> Any:
        plan = original(*arguments)
        return replace(plan, goes_on=torch.where(plan.begins >= 0, -1, plan.goes_on))

    patch.setattr(byte, "_side_plan", sure)


def first_bytes_only(patch: pytest.MonkeyPatch) -> None:
    """Cells of whole shared tokens are taken for their first bytes."""
    original = shared_prefix.shared_prefix_cells

    def coarse(student: Any, teacher: Any) -> Any:
        cells = original(student, teacher)
        return replace(cells, student=cells.student // 2, teacher=cells.teacher // 2)

    patch.setattr(shared_prefix, "shared_prefix_cells", coarse)


def bpm(beta: float = 0.4) -> Callable[[], None]:
    return lambda: references.test_bpm_is_the_marginal_written_plainly(("chatml", "turns"), beta)


def shared(beta: float = 0.4) -> Callable[[], None]:
    return lambda: references.test_shared_prefix_is_the_jsd_of_the_cells_written_plainly(("chatml", "turns"), beta)


def by_byte(beta: float = 0.5) -> Callable[[], None]:
    return lambda: references.test_byte_is_the_jsd_of_next_byte_distributions_written_plainly(
        ("chatml", "turns"), beta, 1.0
    )


FAULTS: list[tuple[str, Patch, Callable[[], None]]] = [
    ("bpm one row late", one_row_late(BPM), bpm()),
    ("bpm swapped beta", swapped_beta("diglot.objectives.bpm"), bpm()),
    ("bpm dropped stop", dropped_stop(BPM, "column_of"), bpm()),
    ("bpm prefix off by one", shallow_prefix, bpm()),
    ("bpm without spanning", no_spanning, bpm()),
    ("shared_prefix one row late", one_row_late(SharedPrefix), shared()),
    ("shared_prefix swapped beta", swapped_beta("diglot.objectives.shared_prefix"), shared()),
    ("shared_prefix dropped stop", dropped_stop(SharedPrefix, "cells_t"), shared()),
    ("shared_prefix coarse cells", first_bytes_only, shared()),
    ("byte swapped beta", swapped_beta("diglot.objectives.byte"), by_byte(0.2)),
    ("byte prefix off by one", one_node_up, by_byte()),
    ("byte never ended", never_ended, by_byte()),
    ("byte always ended", always_ended, by_byte()),
    ("escd one row late", one_row_late(ESCD), references.test_escd_adds_the_completions_written_plainly),
    (
        "equal distributions one row late",
        one_row_late(SharedPrefix),
        lambda: promises.test_equal_distributions_over_equal_vocabularies_give_zero_loss_and_zero_gradient(
            "shared_prefix", {}
        ),
    ),
    (
        "byte teacher read with the student's table",
        lambda patch: patch.setattr(ByteDistribution, "summary_t", ByteDistribution.summary_s),
        by_byte(),
    ),
]


@pytest.mark.parametrize(("patch", "named_test"), [f[1:] for f in FAULTS], ids=[f[0].replace(" ", "-") for f in FAULTS])
def test_a_planted_fault_makes_the_named_test_fail(
    patch: Patch, named_test: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    named_test()
    patch(monkeypatch)
    with pytest.raises((AssertionError, ValueError, ZeroDivisionError, IndexError, RuntimeError)):
        named_test()
