"""ULD and GOLD against float64 sums written from their definitions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import support.tokenizers_zoo as zoo
import torch
from support import tiny
from support.scored import Scored, pair
from torch import Tensor

from diglot.alignment import Side, align
from diglot.batches import Written, WrittenSide
from diglot.errors import ConfigError
from diglot.objectives import Pair, Path, generalized_jsd, make_objective
from diglot.objectives.jsd import full_jsd
from diglot.objectives.uld import sorted_l1

# Student: 12 ids, stop {10, 11}; teacher: 9 ids, stop {8}. Shared in another order.
PAIR = Pair(
    same=False,
    size_s=12,
    size_t=9,
    shared_s=torch.tensor([1, 3, 4, 6, 9]),
    shared_t=torch.tensor([7, 0, 2, 5, 1]),
    stop_s=torch.tensor([10, 11]),
    stop_t=torch.tensor([8]),
)
SAME = Pair(True, 8, 8, torch.arange(7), torch.arange(7), torch.tensor([7]), torch.tensor([7]))
BETAS = [0.0, 0.3, 0.5, 1.0]


def logits(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def rest(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def side(*segments: list[int], stop: bool = True, inexact: tuple[int, ...] = ()) -> WrittenSide:
    end = np.array([e for s in segments for e in s], dtype=np.int64)
    segment = np.array([k for k, s in enumerate(segments) for _ in s], dtype=np.int64)
    last = np.append(segment[1:] != segment[:-1], True)
    exact = ~np.isin(np.arange(len(end)), inexact)
    return WrittenSide(np.arange(len(end)) % 9, end, segment, exact, last & stop)


def written(student: WrittenSide, teacher: WrittenSide) -> Written:
    num = int(student.segment.max()) + 1
    s, t = (Side(x.end, x.segment, x.exact, x.stop) for x in (student, teacher))
    return Written(student, teacher, align(s, t, num), [b""] * num)


# Segment 0 in chunks of 2:1, 1:1, 1:3, stop; segment 1 of 2:2, stop.
TEXT = written(side([1, 3, 4, 8, 9], [2, 3, 4]), side([3, 4, 5, 7, 8, 9], [1, 3, 4]))
# The same without stops: cut by a length limit.
CUT = written(side([1, 3, 4, 8], [2, 3], stop=False), side([3, 4, 5, 7, 8], [1, 3], stop=False))


@dataclass
class Teller:
    """Log-probs that are told apart by their token."""

    path: Path

    def student_logps(self, token: Tensor, ids: Tensor) -> Tensor:
        return self.path.logp_s[token]

    def teacher_logps(self, token: Tensor, ids: Tensor) -> Tensor:
        return self.path.logp_t[token]

    def teacher_ranges(self, token: Tensor, low: Tensor, high: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass
class LateTeller(Teller):
    def student_logps(self, token: Tensor, ids: Tensor) -> Tensor:
        return -(token * 100.0 + ids) / 1000

    def teacher_logps(self, token: Tensor, ids: Tensor) -> Tensor:
        return -(token * 100.0 + ids) / 500


def path_of(text: Written) -> Path:
    logp_s = -torch.arange(1.0, len(text.student.ids) + 1, dtype=torch.float64)
    logp_t = -torch.arange(1.0, len(text.teacher.ids) + 1, dtype=torch.float64) / 8
    return Path(logp_s.requires_grad_(), logp_t.requires_grad_())


# ---- sorted L1 and uld -----------------------------------------------------------------------------------------------


def plain_sorted_l1(p: list[float], q: list[float]) -> float:
    longest = max(len(p), len(q))
    a, b = (sorted([*x, *[0.0] * (longest - len(x))], reverse=True) for x in (p, q))
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("size_s", "size_t"), [(12, 9), (9, 12), (8, 8), (3, 0), (0, 3), (0, 0)])
def test_uld_is_its_definition_and_pads_the_shorter_side_with_zeros(size_s: int, size_t: int) -> None:
    p, q = (logits(5, size, seed).softmax(-1) for seed, size in enumerate((size_s, size_t)))
    expected = [plain_sorted_l1(a, b) for a, b in zip(p.tolist(), q.tolist(), strict=True)]
    assert sorted_l1(p, q).tolist() == pytest.approx(expected, abs=1e-12)
    if size_s and size_t:
        values = make_objective("uld", PAIR)(p.log(), q.log())
        assert values.loss.tolist() == pytest.approx(expected, abs=1e-12)


def test_equal_spectra_of_disjoint_meaning_have_no_uld() -> None:
    """It is not a divergence on text: here the two sides agree on nothing, and the loss is zero, gradient and all."""
    s = torch.tensor([[0.7, 0.3, 0.0, 0.0]], dtype=torch.float64).log().requires_grad_()
    t = torch.tensor([[0.0, 0.0, 0.3, 0.7]], dtype=torch.float64).log()
    loss = make_objective("uld", PAIR)(s, t).loss
    assert loss.item() == 0
    assert torch.autograd.grad(loss.sum(), s)[0].abs().max() == 0
    assert generalized_jsd(s.log_softmax(-1), t.log_softmax(-1), 0.5).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(("size_s", "size_t"), [(6, 6), (7, 5), (5, 7)])
def test_the_gradient_of_uld_is_the_derivative(size_s: int, size_t: int) -> None:
    s, t = logits(3, size_s, 3).requires_grad_(), logits(3, size_t, 4)
    assert torch.autograd.gradcheck(lambda x: make_objective("uld", PAIR)(x, t).loss, (s,))


def test_the_backward_pass_of_sorted_l1_keeps_one_byte_per_mass() -> None:
    p, q = logits(4, 50, 5).softmax(-1).requires_grad_(), logits(4, 60, 6).softmax(-1)
    node = sorted_l1(p, q).grad_fn
    (signs,) = node.saved_tensors  # type: ignore[union-attr]
    assert signs.dtype == torch.int8 and signs.shape == p.shape


def test_uld_reads_pairs_or_the_same_index() -> None:
    pairs = make_objective("uld", PAIR).rows(TEXT)
    assert (pairs.student.tolist(), pairs.teacher.tolist()) == ([2, 4, 7], [1, 5, 8])
    index = make_objective("uld", PAIR, rows="index").rows(TEXT)
    assert (index.student.tolist(), index.teacher.tolist()) == ([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 6, 7, 8])
    unsure = written(side([1, 3, 4, 8, 9], [2, 3, 4], inexact=(1,)), side([3, 4, 5, 7, 8, 9], [1, 3, 4], inexact=(6,)))
    index = make_objective("uld", PAIR, rows="index").rows(unsure)
    assert (index.student.tolist(), index.skipped) == ([0, 2, 3, 4, 6, 7], {"not_comparable": 2})


# ---- gold ------------------------------------------------------------------------------------------------------------


def plain_gold(row_s: Tensor, row_t: Tensor, rest_s: float, rest_t: float, beta: float) -> tuple[float, float]:
    """Both parts of one chunk, id by id, from probabilities."""
    p = [x * math.exp(rest_s) for x in row_s.softmax(-1).tolist()]
    q = [x * math.exp(rest_t) for x in row_t.softmax(-1).tolist()]
    ids_s, ids_t, stop_s, stop_t = (x.tolist() for x in (PAIR.shared_s, PAIR.shared_t, PAIR.stop_s, PAIR.stop_t))
    in_s = [p[i] for i in ids_s] + [sum(p[i] for i in stop_s)]
    in_t = [q[i] for i in ids_t] + [sum(q[i] for i in stop_t)]
    out_s = [x for i, x in enumerate(p) if i not in ids_s + stop_s]
    out_t = [x for i, x in enumerate(q) if i not in ids_t + stop_t]
    both = list(zip(in_s, in_t, strict=True))
    if beta in (0, 1):
        matched = sum(b * math.log(b / a) for a, b in both) if beta == 0 else sum(a * math.log(a / b) for a, b in both)
    else:
        z = [beta * b + (1 - beta) * a for a, b in both]
        matched = sum(beta * b * math.log(b / m) for (_, b), m in zip(both, z, strict=True))
        matched += sum((1 - beta) * a * math.log(a / m) for (a, _), m in zip(both, z, strict=True))
    return matched, plain_sorted_l1(out_s, out_t)


REST_S, REST_T = rest(0.0, -0.4, -2.0, 0.0, -7.0), rest(0.0, 0.0, -1.5, -3.0, -0.1)


@pytest.mark.parametrize("weights", ["mass", "count"])
@pytest.mark.parametrize("beta", BETAS)
def test_gold_is_its_definition(beta: float, weights: str) -> None:
    s, t = logits(5, 12, 7), logits(5, 9, 8)
    values = make_objective("gold", PAIR, beta=beta, weights=weights)(s, t, rest_s=REST_S, rest_t=REST_T)
    parts = [plain_gold(*row, beta) for row in zip(s, t, REST_S.tolist(), REST_T.tolist(), strict=True)]
    matched, unmatched = zip(*parts, strict=True)
    assert values.metrics["matched"].tolist() == pytest.approx(matched, abs=1e-12)
    assert values.metrics["unmatched"].tolist() == pytest.approx(unmatched, abs=1e-12)
    w_m, w_u = (1.0, 1.0) if weights == "mass" else (6 / 9, 3 / 9)  # five shared ids and one stop id of nine
    assert values.loss.tolist() == pytest.approx([w_m * m + w_u * u for m, u in parts], abs=1e-12)
    assert values.metrics["mass_s"].tolist() == pytest.approx(
        s.softmax(-1)[:, [1, 3, 4, 6, 9, 10, 11]].sum(-1).tolist(), abs=1e-12
    )


def test_beta_zero_is_forward_and_a_swapped_beta_is_another_number() -> None:
    s, t = logits(1, 12, 9), logits(1, 9, 10)
    inputs = {"rest_s": rest(-0.3), "rest_t": rest(0.0)}
    losses = {
        b: make_objective("gold", PAIR, beta=b)(s, t, **inputs).metrics["matched"].item() for b in (0, 0.3, 0.7, 1)
    }
    assert losses[0] == pytest.approx(plain_gold(s[0], t[0], -0.3, 0.0, 0)[0])
    for beta, swapped in ((0, 1), (0.3, 0.7)):
        assert abs(losses[beta] - losses[swapped]) > 1e-3


@pytest.mark.parametrize("beta", BETAS)
def test_gold_equals_jsd_where_everything_is_matched_and_chunks_are_tokens(beta: float) -> None:
    s, t = logits(4, 8, 11).requires_grad_(), logits(4, 8, 12)
    zero = rest(0, 0, 0, 0)
    for weights in ("mass", "count"):
        loss = make_objective("gold", SAME, beta=beta, weights=weights)(s, t, rest_s=zero, rest_t=zero).loss
        expected = full_jsd(s, t, beta)
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
        one, other = (torch.autograd.grad(x.sum(), s)[0] for x in (loss, expected))
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [0.3, 0.5])
def test_equal_distributions_have_no_gold_and_no_gradient_even_of_merged_chunks(beta: float) -> None:
    partly = Pair(True, 8, 8, torch.arange(4), torch.arange(4), torch.tensor([7]), torch.tensor([7]))
    s, before = logits(4, 8, 13).requires_grad_(), rest(0.0, -1.0, -2.0, -5.0).requires_grad_()
    inputs = {"rest_s": before, "rest_t": before.detach()}
    loss = make_objective("gold", partly, beta=beta)(s, s.detach(), **inputs).loss
    assert loss.abs().max() < 1e-12
    for gradient in torch.autograd.grad(loss.sum(), (s, before)):
        assert gradient.abs().max() < 1e-12


def test_forward_kl_on_what_is_matched_pushes_down_all_that_is_not() -> None:
    """The known bias of the endpoint: at equal distributions, by each token's probability times the teacher's mass
    on M."""
    partly = Pair(True, 8, 8, torch.arange(4), torch.arange(4), torch.tensor([7]), torch.tensor([7]))
    s, zero = logits(4, 8, 14).requires_grad_(), rest(0, 0, 0, 0)
    loss = make_objective("gold", partly, beta=0.0)(s, s.detach(), rest_s=zero, rest_t=zero).loss
    (gradient,) = torch.autograd.grad(loss.sum(), s)
    p = s.detach().softmax(-1)
    mass = p[:, [0, 1, 2, 3, 7]].sum(-1, keepdim=True)
    assert loss.abs().max() < 1e-12
    torch.testing.assert_close(gradient[:, 4:7], p[:, 4:7] * mass)


@pytest.mark.parametrize("beta", BETAS)
def test_the_gradient_of_gold_is_the_derivative_also_of_the_earlier_tokens(beta: float) -> None:
    s, t, before = logits(3, 12, 15).requires_grad_(), logits(3, 9, 16), rest(0.0, -0.4, -2.0).requires_grad_()
    objective = make_objective("gold", PAIR, beta=beta)
    assert torch.autograd.gradcheck(
        lambda x, y: objective(x, t, rest_s=y, rest_t=rest(0.0, -1.0, -0.2)).loss, (s, before)
    )


def test_gold_sees_the_distribution_not_the_ids() -> None:
    """Renumbering the teacher, and splitting its stop mass over two ids, changes nothing."""
    s, t = logits(5, 12, 17), logits(5, 9, 18)
    order = torch.tensor([3, 9, 0, 6, 1, 8, 2, 5, 4])
    renumbered = torch.empty(5, 10, dtype=torch.float64)
    renumbered[:, order] = t
    renumbered[:, [4, 7]] = t[:, [8]] - math.log(2)
    other = Pair(False, 12, 10, PAIR.shared_s, order[PAIR.shared_t], PAIR.stop_s, torch.tensor([7, 4]))
    inputs = {"rest_s": REST_S, "rest_t": REST_T}
    one, two = make_objective("gold", PAIR)(s, t, **inputs), make_objective("gold", other)(s, renumbered, **inputs)
    torch.testing.assert_close(one.loss, two.loss)


@pytest.mark.parametrize("beta", BETAS)
def test_masses_that_are_zero_give_no_nan(beta: float) -> None:
    s, t = logits(3, 12, 19), logits(3, 9, 20)
    s[:, [0, 1]], t[:, [7, 3]] = -math.inf, -math.inf  # ids 1 and 7 are the same token, 0 and 3 are unmatched
    s.requires_grad_()
    zero = rest(0, 0, 0)
    loss = make_objective("gold", PAIR, beta=beta)(s, t, rest_s=zero, rest_t=zero).loss
    assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), s)[0].isfinite().all()


# ---- which rows, and what is known of them ---------------------------------------------------------------------------


def test_gold_reads_the_last_row_of_a_chunk_and_the_probability_of_what_was_written_before_it() -> None:
    objective, path = make_objective("gold", PAIR), path_of(TEXT)
    rows = objective.rows(TEXT)
    assert rows.student.tolist() == [1, 2, 3, 4, 6, 7]
    assert rows.teacher.tolist() == [0, 1, 4, 5, 7, 8]
    extra = objective.extra(rows, TEXT, Teller(path))
    assert extra["rest_s"].tolist() == [-1.0, 0.0, 0.0, 0.0, -6.0, 0.0]
    assert extra["rest_t"].tolist() == [0.0, 0.0, -(3 + 4) / 8, 0.0, -7 / 8, 0.0]
    assert not extra["rest_t"].requires_grad
    (gradient,) = torch.autograd.grad(extra["rest_s"].sum(), path.logp_s)
    assert gradient.tolist() == [1.0, 0, 0, 0, 0, 1.0, 0, 0]


def test_gold_leaves_out_chunks_that_are_not_exact() -> None:
    unsure = written(side([1, 3, 4, 8, 9], [2, 3, 4], inexact=(0,)), side([3, 4, 5, 7, 8, 9], [1, 3, 4]))
    objective = make_objective("gold", PAIR)
    rows = objective.rows(unsure)
    assert rows.student.tolist() == [2, 3, 4, 6, 7] and rows.skipped == {"not_exact": 1, "no_row": 0}
    extra = objective.extra(rows, unsure, Teller(path_of(unsure)))
    assert extra["rest_s"].tolist() == [0.0, 0.0, 0.0, -6.0, 0.0]


def test_a_row_read_one_late_is_another_number() -> None:
    scored = Scored.of("chatml", "inst")
    objective: Any = make_objective("gold", scored.pair)
    rows, inputs = scored.rows_and_inputs(objective)
    right = objective(scored.logits_s[rows.student], scored.logits_t[rows.teacher], **inputs).loss[:-1]
    for late_s, late_t in ((1, 0), (0, 1), (1, 1)):
        late = objective(
            scored.logits_s[rows.student[:-1] + late_s],
            scored.logits_t[rows.teacher[:-1] + late_t],
            **{name: value[:-1] for name, value in inputs.items()},
        ).loss
        assert (late != right).all() and (late - right).abs().mean() > 0.01


def shipped() -> Any:
    return make_objective("gold", pair("chatml", "inst"), gold_as_shipped=True)


def test_as_shipped_reads_the_row_after_the_first_token_and_later_tokens_in_rows_after_theirs() -> None:
    objective = shipped()
    rows = objective.rows(TEXT)
    assert rows.student.tolist() == [1, 3, 4, 6]  # the first tokens are 0, 2, 3 and 5
    assert rows.teacher.tolist() == [1, 2, 3, 7]  # 0, 1, 2 and 6
    assert rows.skipped == {"not_exact": 0, "no_row": 2}
    extra = objective.extra(rows, TEXT, LateTeller(path_of(TEXT)))
    # Student token 1 in the row of token 2, token 6 in that of 7; ids are those of `side`.
    assert extra["rest_s"].tolist() == pytest.approx([-0.201, 0, 0, -0.706])
    # Teacher tokens 3 and 4 in the rows of 4 and 5, token 7 in that of 8.
    assert extra["rest_t"].tolist() == pytest.approx([0, 0, -(403 + 504) / 500, -807 / 500])


def test_as_shipped_leaves_out_chunks_that_have_no_row_that_late() -> None:
    """Text that was cut by the length limit: the last chunk of each segment, as there is no stop after it."""
    rows = shipped().rows(CUT)
    assert rows.student.tolist() == [1, 3] and rows.skipped == {"not_exact": 0, "no_row": 2}


def test_as_shipped_leaves_out_chunks_that_are_not_exact() -> None:
    unsure = written(side([1, 3, 4, 8, 9], [2, 3, 4], inexact=(0,)), side([3, 4, 5, 7, 8, 9], [1, 3, 4]))
    rows = shipped().rows(unsure)
    assert rows.student.tolist() == [3, 4, 6] and rows.skipped == {"not_exact": 1, "no_row": 2}


def test_as_shipped_says_what_it_cannot_do() -> None:
    with pytest.raises(ConfigError, match=r"byte-level tokenizers only; these are byte-level.*metaspace"):
        make_objective("gold", pair("chatml", "turns"), gold_as_shipped=True)
    with pytest.raises(ConfigError, match="weights='mass' is not what TRL ships"):
        make_objective("gold", pair("chatml", "inst"), gold_as_shipped=True, weights="mass")
    with pytest.raises(ConfigError, match="has no vocabularies"):
        make_objective("gold", PAIR, gold_as_shipped=True)


def test_as_shipped_trains(tmp_path: Any) -> None:
    entry = {"name": "gold", "gold_as_shipped": True}
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), objective=[entry], lmbda=0.0)
    before = tiny.parameters(trainer.model)
    trainer.train()
    assert any(not (before[key] == after).all() for key, after in tiny.parameters(trainer.model).items())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("uld", {"rows": "all"}, "rows='all'.*'pairs' or 'index'"),
        ("gold", {"beta": 1.5}, "beta=1.5"),
        ("gold", {"weights": "even"}, "weights='even'.*'mass' or 'count'"),
    ],
)
def test_options_that_cannot_work_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_objective(name, PAIR, **options)


def test_an_empty_stop_set_is_refused() -> None:
    nothing = Pair(False, 12, 9, PAIR.shared_s, PAIR.shared_t, PAIR.stop_s, torch.tensor([], dtype=torch.int64))
    with pytest.raises(ConfigError, match="the teacher has an empty stop set"):
        make_objective("gold", nothing)


@pytest.mark.parametrize("name", ["uld", "gold"])
def test_nothing_written_gives_no_values(name: str) -> None:
    none = WrittenSide(*(np.zeros(0, kind) for kind in (np.int64, np.int64, np.int64, bool, bool)))
    sides = (Side(x.end, x.segment, x.exact, x.stop) for x in (none, none))
    empty = Written(none, none, align(*sides, 0), [])
    for options in ({}, {"rows": "index"} if name == "uld" else {"weights": "count"}):
        objective: Any = make_objective(name, PAIR, **options)
        rows = objective.rows(empty)
        extra = objective.extra(rows, empty, Teller(Path(torch.zeros(0), torch.zeros(0))))
        assert objective(torch.zeros(0, 12), torch.zeros(0, 9), **extra).loss.shape == (0,)
    assert make_objective("uld", PAIR).rows(empty).items == 0
