"""The covering distribution is what the teacher expects next given the text so far, and nothing of what comes later."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from support import scored, tiny

from diglot.batches import AlignedBatch
from diglot.comparisons.comparison import Answers
from diglot.comparisons.scores import ModelScores, Side
from diglot.heads import Head
from diglot.objectives import make_objective
from diglot.objectives.covering_plan import CoveringPlan, plan_covering
from diglot.teachers import LocalTeacher

TEXTS = (
    "The river had been rising.",
    "x = 12345 + 67",
    "unbelievable, unbearable things",
    "def add(a):\n    return 1234",
    "",
)
PAIRS = [("chatml", "inst"), ("inst", "chatml"), ("chatml", "turns"), ("turns", "chatml")]


@lru_cache
def teacher(name: str) -> LocalTeacher:
    model = tiny.tiny_model(scored.renderer(name).tokenizer, seed=3)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)  # far from uniform, so that a wrong row shows
    return LocalTeacher(model, scored.renderer(name))


def read(student: str, name: str, texts: tuple[str, ...] = TEXTS) -> AlignedBatch:
    return scored.read(student, name, texts)


def scores(batch: AlignedBatch, student: str, name: str) -> ModelScores:
    held, made = teacher(name), scored.pair(student, name)
    model = tiny.tiny_model(scored.renderer(student).tokenizer, seed=5)
    head = Head.of(model)
    hidden = torch.randn(
        len(batch.written.student.ids), model.config.hidden_size, generator=torch.Generator().manual_seed(0)
    )
    return ModelScores(
        batch,
        hidden.requires_grad_(),
        Answers(held, batch.teacher),
        Side(head, scored.renderer(student).vocabulary, made.stop_s),
        Side(held.head, held.renderer.vocabulary, made.stop_t),
        chunk_rows=lambda few: 64,
    )


def test_a_target_depends_on_the_past_alone() -> None:
    """Two texts that part behind a byte have one target up to there, whatever the teacher's tokens for them are."""
    student, name = "turns", "chatml"
    texts = ("so 1234 shells", "so 12 shells", "so 123, then")
    objective: Any = make_objective("covering", scored.pair(student, name))
    batch = read(student, name, texts)
    plan: CoveringPlan = objective.plan(batch.written)
    targets, side = objective.targets(plan, scores(batch, student, name)), batch.written.student
    seen: dict[bytes, dict[int, float]] = {}
    shared = 0
    for r, i in enumerate(plan.student.tolist()):
        past = batch.written.texts[side.segment[i]][: side.start[i]]
        cells = {int(c): m for c, m in zip(targets.column[r], targets.mass[r], strict=True) if c >= 0 and m > 1e-3}
        if past in seen:
            shared += 1
            assert cells == pytest.approx(seen[past], abs=1e-4)
        seen[past] = cells
    assert shared >= 6


def test_masses_are_those_of_a_distribution() -> None:
    for student, name in PAIRS:
        batch = read(student, name)
        objective: Any = make_objective("covering", scored.pair(student, name))
        targets = objective.targets(objective.plan(batch.written), scores(batch, student, name))
        total = targets.mass.sum(-1) + targets.stop
        assert (total <= 1 + 1e-6).all() and (targets.mass >= 0).all()
        assert (
            targets.own_mass <= np.take_along_axis(targets.mass, targets.own.clip(0)[:, None], 1)[:, 0] + 1e-9
        ).all()
        assert ((targets.canonical > 0) & (targets.canonical <= 1 + 1e-9)).all()


def test_what_the_students_tokenizer_would_merge_gets_no_mass() -> None:
    """Behind a token, no target has a token that its tokenizer would never have written there."""
    student, name = "chatml", "turns"
    batch = read(student, name)
    objective: Any = make_objective("covering", scored.pair(student, name))
    plan = objective.plan(batch.written)
    targets, side = objective.targets(plan, scores(batch, student, name)), batch.written.student
    vocabulary, spell = scored.renderer(student).vocabulary, scored.renderer(student).encoder.spell
    checked = lost = 0
    for r in range(plan.items):
        if plan.previous[r] < 0:
            continue
        before, merged = int(side.ids[plan.previous[r]]), 0.0
        for cell, mass in zip(targets.column[r].tolist(), targets.mass[r].tolist(), strict=True):
            if cell < 0 or mass < 2e-3 or objective.cells.size[cell] > 1:
                continue
            (ids,) = spell([vocabulary.token(before) + vocabulary.token(cell)])
            if ids is not None and ids != [before, cell]:
                merged += mass
            checked += 1
        # Where nearly all that is expected would be merged, the written tokens cannot be gone on with canonically.
        assert merged == 0 or targets.canonical[r] == 1.0
        lost += merged > 0
    assert checked > 20 and lost < len(plan.student) / 4
    assert targets.canonical.min() < 0.999  # something was left out


def test_the_gradient_is_that_of_the_plain_formula() -> None:
    """Blocks, cells and the split token change nothing: autograd through the whole rows says the same."""
    student, name = "chatml", "inst"
    batch = read(student, name)
    objective: Any = make_objective("covering", scored.pair(student, name), beta=0.3)
    made = scores(batch, student, name)
    plan = objective.plan(batch.written)
    loss, metrics = objective.loss(plan, made, 0.5)
    (gradient,) = torch.autograd.grad(loss, [made.hidden_s])
    targets = objective.targets(plan, made)
    hidden = made.hidden_s.detach().double().requires_grad_()
    weight = made.student.head.parameters[0].detach().double()
    total = torch.zeros((), dtype=torch.float64)
    for r, i in enumerate(plan.student.tolist()):
        p = (hidden[i] @ weight.T).softmax(-1)
        own = int(batch.written.student.ids[i])
        pieces = [(p[objective.pair.stop_s].sum(), float(targets.stop[r]))]
        pieces.append((p[objective.silent_s].sum(), float(targets.silent[r])))
        for c, (cell, mass) in enumerate(zip(targets.column[r].tolist(), targets.mass[r].tolist(), strict=True)):
            if cell < 0:
                continue
            members = np.flatnonzero(objective.cells.cell == cell).tolist()
            split = targets.own[r] == c
            summed = [m for m in members if not (split and m == own)]
            pieces.append((p[summed].sum(), mass - (float(targets.own_mass[r]) if split else 0.0)))
            if split:
                pieces.append((p[own], float(targets.own_mass[r])))
        rest_p, rest_t = 1 - sum(x for x, _ in pieces), 1 - sum(m for _, m in pieces)
        for x, m in [*pieces, (rest_p, rest_t)]:
            t, x = torch.tensor(max(m, 1e-8), dtype=torch.float64), x.clamp(min=1e-8)
            mixed = 0.3 * t + 0.7 * x
            total = total + 0.3 * t * (t / mixed).log() + 0.7 * x * (x / mixed).log()
    (wanted,) = torch.autograd.grad(0.5 * total, [hidden])
    assert float(loss.detach()) == pytest.approx(0.5 * float(total.detach()), rel=1e-4)
    torch.testing.assert_close(gradient.double(), wanted, rtol=2e-3, atol=1e-6)
    assert len(metrics["loss"]) == plan.items


def test_neither_the_order_of_a_batch_nor_bfloat16_changes_what_is_compared() -> None:
    """The same texts the other way round have the same sum; logits of 16 bits cost no more than their rounding."""
    student, name = "turns", "inst"
    objective: Any = make_objective("covering", scored.pair(student, name))
    sums = []
    for texts in (TEXTS[:3], TEXTS[:3][::-1]):
        batch = read(student, name, texts)
        made = scores(batch, student, name)
        logits = made.student.head(made.hidden_s.detach())
        plan = objective.plan(batch.written)
        order = np.argsort([texts.index(TEXTS[:3][k]) for k in range(3)])
        targets = objective.targets(plan, made)
        rank = order[batch.written.student.segment[plan.student]]
        flat = torch.linspace(-1, 1, logits.shape[1]).expand(len(plan.student), -1)
        inputs = objective.row_inputs(plan, targets, batch.written, torch.device("cpu"))
        values, rounded = objective(flat, None, **inputs).loss, objective(flat.bfloat16(), None, **inputs).loss
        assert torch.isfinite(values).all()
        torch.testing.assert_close(values, rounded, rtol=0.05, atol=1e-2)
        sums.append([float(values[torch.from_numpy(rank == k)].sum()) for k in range(3)])
    assert sums[0] == pytest.approx(sums[1], rel=1e-3)


def test_every_student_token_of_an_exact_text_is_compared() -> None:
    batch = read("chatml", "turns", ("x = 12345 and unbelievable",))
    made = scored.pair("chatml", "turns")
    plan = plan_covering(batch.written, made.tables.student, made.tables.teacher, made.tables.spell_t)
    assert len(plan.student) == len(batch.written.student.ids) and plan.skipped == {"unreadable": 0}
    assert (plan.last >= 0).any()  # somewhere the teacher had to be asked about the text so far


def test_a_batch_without_anything_to_read_has_no_loss() -> None:
    """As a rank has where all its texts were cut before the first scored token."""
    student, name = "chatml", "inst"
    batch = scored.read(student, name, ())
    objective: Any = make_objective("covering", scored.pair(student, name))
    plan = objective.plan(batch.written)
    loss, _ = objective.loss(plan, scores(batch, student, name), 1.0)
    assert plan.items == 0 and float(loss.detach()) == 0.0
