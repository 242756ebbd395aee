"""What every objective promises, on real texts through tokenizers of unlike kinds with random logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.scored import TEXTS, Scored, read

from diglot.batches import Written
from diglot.objectives import OBJECTIVES, PathObjective, RowObjective, SummaryObjective, make_objective
from diglot.vocabulary import Vocabulary

PAIRS = [("chatml", "turns"), ("turns", "inst"), ("unigram", "chatml"), ("inst", "unigram"), ("nfc", "wordpiece")]
# dskd compares hidden states, covering reads the teacher on more than the text: test_dskd.py, test_covering.py.
CROSS = sorted(set(OBJECTIVES) - {"jsd", "dskd", "covering"})
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in CROSS),
    ("strict", {"residual": True, "beta": 0.5, "top_k": 0}),
    *((name, {"beta": beta}) for name in ("bpm", "shared_prefix", "escd", "gold") for beta in (0.5, 1.0)),
    *(("byte", {"beta": beta, "anchor": 0.0}) for beta in (0.0, 0.5, 1.0)),
]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items())}" for name, options in VARIANTS]


@pytest.mark.parametrize("sides", PAIRS, ids="-".join)
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
def test_values_and_gradients_are_finite_and_sums_do_not_depend_on_the_order_of_the_batch(
    sides: tuple[str, str], name: str, options: dict[str, Any]
) -> None:
    scored = Scored.of(*sides)
    values = scored.values(name, **options)
    gradient = scored.gradient(values.loss)
    assert len(values.loss) and values.loss.isfinite().all() and gradient.isfinite().all()
    turned, order_s, order_t = _reordered(scored, sides)
    turned.logits_s = scored.logits_s[order_s].detach().requires_grad_()
    turned.logits_t = scored.logits_t[order_t]
    again = turned.values(name, **options)
    torch.testing.assert_close(again.loss.sum(), values.loss.sum())
    torch.testing.assert_close(turned.gradient(again.loss), gradient[order_s])


def _reordered(scored: Scored, sides: tuple[str, str]) -> tuple[Scored, torch.Tensor, torch.Tensor]:
    """The same texts the other way round, and for each of its tokens the old place."""
    batch = read(*sides, TEXTS[::-1])
    orders = []
    for side in (scored.batch.written.student, scored.batch.written.teacher):
        segments = [np.flatnonzero(side.segment == k) for k in range(len(TEXTS))]
        orders.append(torch.from_numpy(np.concatenate(segments[::-1])))
    return Scored(scored.pair, batch, scored.logits_s, scored.logits_t), orders[0], orders[1]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
def test_permuting_the_ids_of_both_vocabularies_changes_nothing(name: str, options: dict[str, Any]) -> None:
    scored = Scored.of("chatml", "turns")
    values = scored.values(name, **options)
    permuted, columns = _permuted(scored)
    renumbered = permuted.values(name, **options)
    torch.testing.assert_close(renumbered.loss.sum(), values.loss.sum(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(permuted.gradient(renumbered.loss), scored.gradient(values.loss)[:, columns])


def _permuted(scored: Scored) -> tuple[Scored, torch.Tensor]:
    """The same problem with other ids on both sides; column `k` of the student is the old column `columns[k]`."""
    draw = np.random.default_rng(3)
    tables = scored.pair.need_tables("test")
    sides, logits, vocabularies, old_places = [], [], [], []
    for side, vocabulary, of_side in (
        (scored.batch.written.student, tables.student, scored.logits_s),
        (scored.batch.written.teacher, tables.teacher, scored.logits_t),
    ):
        old = draw.permutation(len(vocabulary))
        new = np.argsort(old)
        sides.append(replace(side, ids=new[side.ids]))
        logits.append(of_side.detach()[:, torch.from_numpy(old)])
        vocabularies.append(_renumbered(vocabulary, old))
        old_places.append((old, new))
    (old_s, new_s), (_, new_t) = old_places

    def renumbered(spell: Any, new: np.ndarray) -> Any:
        return lambda texts: [ids and new[ids].tolist() for ids in spell(texts)]

    pair = type(scored.pair).of(
        vocabularies[0],
        vocabularies[1],
        new_s[scored.pair.stop_s.numpy()].tolist(),
        new_t[scored.pair.stop_t.numpy()].tolist(),
        renumbered(tables.spell_s, new_s),
        renumbered(tables.spell_t, new_t),
    )
    written = Written(sides[0], sides[1], scored.batch.written.alignment, scored.batch.written.texts)
    batch = replace(scored.batch, written=written)
    return Scored(pair, batch, logits[0].requires_grad_(), logits[1]), torch.from_numpy(old_s)


def _renumbered(vocabulary: Vocabulary, old: np.ndarray) -> Vocabulary:
    texts = [vocabulary.token(int(i)) for i in old]
    names = {int(k): vocabulary.names[int(i)] for k, i in enumerate(old) if int(i) in vocabulary.names}
    offsets = np.concatenate([[0], np.cumsum([len(t) for t in texts])]).astype(np.int64)
    data = np.frombuffer(b"".join(texts), dtype=np.uint8)
    return replace(vocabulary, data=data, offsets=offsets, control=vocabulary.control[old], names=names)


ROWS = [(name, options) for name, options in VARIANTS if issubclass(OBJECTIVES[name], RowObjective)]


@pytest.mark.parametrize(("name", "options"), ROWS, ids=[f"{n}{sorted(o.items())}" for n, o in ROWS])
def test_each_row_s_value_is_its_own(name: str, options: dict[str, Any]) -> None:
    scored = Scored.of("inst", "turns")
    objective = make_objective(name, scored.pair, **options)
    assert isinstance(objective, RowObjective)
    rows, inputs = scored.rows_and_inputs(objective)
    whole = objective(scored.logits_s[rows.student], scored.logits_t[rows.teacher], **dict(inputs)).loss
    for part in (slice(0, 1), slice(3, 11)):
        known = {key: value[part] for key, value in inputs.items()}
        alone = objective(scored.logits_s[rows.student[part]], scored.logits_t[rows.teacher[part]], **known).loss
        torch.testing.assert_close(alone, whole[part])
    assert not objective(scored.logits_s[:0], scored.logits_t[:0], **{k: v[:0] for k, v in inputs.items()}).loss.numel()


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
def test_what_is_not_compared_gets_exactly_no_gradient(name: str, options: dict[str, Any]) -> None:
    """Tokens that lie in no exact chunk: their rows are masked, whatever the objective."""
    if name == "ce":
        return  # imitates every token of the text, comparable or not
    scored = Scored.of("nfc", "wordpiece", ["Ünïcode été, two  words", "plain words"])
    masked = torch.from_numpy(~scored.batch.written.usable_s)
    assert 2 < masked.sum() < len(masked) - 2
    gradient = scored.gradient(scored.values(name, **options).loss)
    assert (gradient[masked] == 0).all() and (gradient[~masked] != 0).any()


@pytest.mark.parametrize(("name", "options"), ROWS, ids=[f"{n}{sorted(o.items())}" for n, o in ROWS])
def test_no_row_looks_at_a_position_after_the_text_that_it_predicts(name: str, options: dict[str, Any]) -> None:
    """Scores of all rows that predict later bytes are replaced: no earlier value may change."""
    scored = Scored.of("chatml", "inst", TEXTS[:1])
    written = scored.batch.written
    objective = make_objective(name, scored.pair, **options)
    rows = objective.rows(written)  # type: ignore[union-attr]
    before = scored.of_objective(objective).loss.detach()
    # What a row may see ends where its own token ends, or its chunk where the objective merges chunks.
    chunk = written.alignment.chunk_s
    last = np.array([written.student.end[chunk == c].max() for c in range(written.alignment.num_chunks)])
    for cut in range(2, int(written.student.end.max()) - 2, 3):
        changed = Scored.of("chatml", "inst", TEXTS[:1])
        later_s, later_t = (torch.from_numpy(side.start >= cut) for side in (written.student, written.teacher))
        changed.logits_s = torch.where(later_s[:, None], 2 * changed.logits_s.roll(1, 1), changed.logits_s)
        changed.logits_t = torch.where(later_t[:, None], 2 * changed.logits_t.roll(1, 1), changed.logits_t)
        after = changed.of_objective(objective).loss.detach()
        sees_until = last[chunk[rows.student.numpy()]]
        early = torch.from_numpy(sees_until <= cut)
        torch.testing.assert_close(after[early], before[early], rtol=0, atol=0)
        assert early.all() or (after != before).any()


SAME_ZERO = [
    ("jsd", {"beta": 0.3}),
    ("strict", {}),
    ("bpm", {}),
    ("bpm", {"beta": 0.5}),
    ("bpm", {"beta": 1.0}),
    ("shared_prefix", {}),
    ("escd", {}),
    ("byte", {"anchor": 0.0}),
    ("byte", {"anchor": 0.0, "beta": 1.0}),
    ("sequence_kl", {}),
    ("span", {}),
    ("uld", {}),
    ("gold", {}),
    ("gold", {"beta": 0.3, "weights": "count"}),
]


@pytest.mark.parametrize(("name", "options"), SAME_ZERO, ids=[f"{n}{sorted(o.items())}" for n, o in SAME_ZERO])
def test_equal_distributions_over_equal_vocabularies_give_zero_loss_and_zero_gradient(
    name: str, options: dict[str, Any]
) -> None:
    scored = Scored.of("chatml", "chatml")
    scored.logits_t = scored.logits_s.detach().clone()
    values = scored.values(name, **options)
    assert values.loss.abs().max() < 1e-9
    assert scored.gradient(values.loss).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("ce", {}, "it imitates the text, whatever the teacher says"),
        ("byte", {}, "its anchor is the surprisal of the student's own cut"),
    ],
)
def test_what_cannot_be_zero_for_equal_distributions_is_not(name: str, options: dict[str, Any], why: str) -> None:
    scored = Scored.of("chatml", "chatml")
    scored.logits_t = scored.logits_s.detach().clone()
    values = scored.values(name, **options)
    assert values.loss.abs().max() > 0.1, why
    assert scored.gradient(values.loss).abs().max() > 1e-3


LIMITS = [("bpm", {"beta": 0.0, "skip_blank": False}, 0.0), ("bpm", {"beta": 0.5, "skip_blank": False}, 0.5)]
LIMITS += [("shared_prefix", {"beta": beta}, beta) for beta in (0.0, 0.3, 1.0)]


@pytest.mark.parametrize(("name", "options", "beta"), LIMITS, ids=[f"{n}-{b}" for n, _, b in LIMITS])
def test_with_equal_vocabularies_the_value_is_the_textbook_jsd(name: str, options: dict[str, Any], beta: float) -> None:
    """The zoo's control ids share one cell and its stop ids another: dead columns make the comparison exact."""
    scored = Scored.of("chatml", "chatml")
    control = torch.from_numpy(scored.pair.need_tables("test").student.control.copy())
    control[scored.pair.stop_s[:1]] = False
    scored.logits_s = scored.logits_s.detach().masked_fill(control, -300.0).requires_grad_()
    scored.logits_t = scored.logits_t.masked_fill(control, -300.0)
    loss, textbook = scored.values(name, **options).loss, scored.values("jsd", beta=beta).loss
    assert len(loss) == len(textbook)
    torch.testing.assert_close(loss, textbook, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(scored.gradient(loss), scored.gradient(textbook), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("sides", PAIRS, ids="-".join)
@pytest.mark.parametrize("name", ["bpm", "escd"])
def test_every_target_of_the_byte_prefix_marginal_sums_to_one(name: str, sides: tuple[str, str]) -> None:
    scored = Scored.of(*sides)
    objective: Any = make_objective(name, scored.pair)
    rows, inputs = scored.rows_and_inputs(objective)
    roots = rows.items
    target, reached, _ = objective.target(
        scored.logits_t[rows.teacher[:roots]], **{k: v[:roots] for k, v in inputs.items()}
    )
    torch.testing.assert_close(target.sum(-1), torch.ones(roots, dtype=torch.float64), rtol=0, atol=1e-6)
    assert (target >= 0).all() and (target[~reached] == 0).all()
    cells = objective.cells(scored.logits_s[rows.student[:roots]], reached).exp()
    torch.testing.assert_close(cells.sum(-1), torch.ones(roots, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", [n for n in CROSS if n not in ("ce", "sequence_kl")])
def test_bf16_logits_cost_no_more_than_their_rounding(name: str) -> None:
    """Reductions are in float32: the error is that of rounded logits, not of sums in bf16."""
    exact = Scored.of("chatml", "turns", dtype=torch.float64)
    rounded = Scored.of("chatml", "turns", dtype=torch.bfloat16)
    upcast = Scored.of("chatml", "turns", dtype=torch.bfloat16)
    upcast.logits_s = upcast.logits_s.detach().double().requires_grad_()
    upcast.logits_t = upcast.logits_t.double()
    of_bf16, of_upcast = rounded.values(name).loss.double(), upcast.values(name).loss
    assert rounded.values(name).loss.dtype != torch.bfloat16
    scale = exact.values(name).loss.abs().mean() + 1e-3
    tolerance = 0.05 if issubclass(OBJECTIVES[name], PathObjective) else 1e-3
    assert (of_bf16 - of_upcast).abs().mean() <= tolerance * scale


def test_the_summaries_of_a_batch_do_not_depend_on_its_blocks() -> None:
    scored = Scored.of("chatml", "turns")
    objective = make_objective("byte", scored.pair)
    assert isinstance(objective, SummaryObjective)
    plan = objective.plan(scored.batch.written)
    summary, rows = objective.summary_s(plan), len(scored.logits_s)
    whole = summary(scored.logits_s, slice(0, rows))
    parts = [summary(scored.logits_s[a : a + 7], slice(a, min(a + 7, rows))) for a in range(0, rows, 7)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0)
