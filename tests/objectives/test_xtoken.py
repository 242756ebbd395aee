"""P-KL and H-KL against plain float64 versions with a dense W, and what they promise."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.hand_made import renumbered, speller, vocabulary
from support.row_problem import linear, normal
from torch import Tensor

from diglot.alignment import Side, align
from diglot.batches import Written, WrittenSide
from diglot.errors import ConfigError, VocabularyError
from diglot.heads import Head, reduce_rows
from diglot.objectives import Pair, RowObjective, make_objective
from diglot.objectives.divergences import generalized_jsd
from diglot.vocabulary import Projection, Vocabulary

STUDENT = vocabulary(
    b"a", b"12", b"b", b"123", "<stop>", b"1", b"aab", b"\xf0\x9f", "<s>", "<end>", b"bb", b"unheard", ""
)
TEACHER = vocabulary(
    b"1", b"2", b"<", b"a", "<eos>", b"3", "<s>", b"b", b"\xf0", b"\x9f", b"zz", b"ab", "<end>"
)  # as many ids, so that a transposed W fits
STOP_S, STOP_T = [4, 9], [4]
SPELLINGS = {"aab": [b"a", b"ab"]}
PAIR = Pair.of(STUDENT, TEACHER, STOP_S, STOP_T, spell_t=speller(TEACHER, SPELLINGS))
NAMES = ["xtoken_p", "xtoken_h"]
FEW: dict[str, dict[str, Any]] = {"xtoken_p": {"top_k": 4}, "xtoken_h": {"rest": 3}}


def logits(rows: int, columns: int, seed: int, scale: float = 2.0) -> Tensor:
    return normal(rows, columns, seed=seed) * scale


def make(name: str, pair: Pair = PAIR, **options: Any) -> Any:
    objective = make_objective(name, pair, **options)
    assert isinstance(objective, RowObjective)
    return objective


def dense(projection: Projection) -> np.ndarray:
    dense = np.zeros((len(projection.ids), projection.size_t))
    for v, (ids, weights) in enumerate(zip(projection.ids, projection.weights, strict=True)):
        for u, weight in zip(ids, weights, strict=True):
            if u >= 0:
                dense[v, u] += weight
    return dense


def distribution(row: Tensor, temperature: float) -> np.ndarray:
    return (row.double() / temperature).softmax(-1).numpy()


def plain_p(
    w: np.ndarray, row_s: Tensor, row_t: Tensor, top_k: int, temperature: float, stop_s: list[int], stop_t: list[int]
) -> tuple[float, float, float]:
    """Loss and both kept masses of one row from probabilities."""
    p, q = distribution(row_s, temperature), distribution(row_t, temperature)
    text = np.array([0.0 if v in stop_s else p[v] for v in range(len(p))])
    pushed = w.T @ text
    named = [u for u in range(len(q)) if u not in stop_t and any(w[v, u] for v in range(len(p)) if v not in stop_s)]
    chosen = sorted(named, key=lambda u: -q[u])[:top_k]
    bins_s = [pushed[u] for u in chosen] + [sum(p[v] for v in stop_s)]
    bins_t = [q[u] for u in chosen] + [sum(q[u] for u in stop_t)]
    loss = sum(
        b / sum(bins_t) * math.log(b / sum(bins_t) / (a / sum(bins_s))) for a, b in zip(bins_s, bins_t, strict=True)
    )
    return temperature**2 * loss, sum(bins_s), sum(bins_t)


def plain_h(
    w: np.ndarray, row_s: Tensor, row_t: Tensor, rest: int, temperature: float, stop_s: list[int], stop_t: list[int]
) -> tuple[float, float, float]:
    p, q = distribution(row_s, temperature), distribution(row_t, temperature)
    best: dict[int, int] = {}
    for v in sorted(range(len(p)), key=lambda v: (len(STUDENT.token(v)), STUDENT.token(v))):
        u = int(w[v].argmax())
        if v in stop_s or u in stop_t or w[v, u] < 0.6:
            continue
        if u not in best or w[v, u] > w[best[u], u]:
            best[u] = v
    common = [(p[v], q[u]) for u, v in best.items()]
    common.append((sum(p[v] for v in stop_s), sum(q[u] for u in stop_t)))
    loss = sum(b * math.log(b / a) for a, b in common)
    left_s = sorted((p[v] for v in range(len(p)) if v not in stop_s and v not in best.values()), reverse=True)[:rest]
    left_t = sorted((q[u] for u in range(len(q)) if u not in stop_t and u not in best), reverse=True)[:rest]
    width = max(len(left_s), len(left_t))
    left_s, left_t = (x + [0.0] * (width - len(x)) for x in (left_s, left_t))
    loss += sum(abs(a - b) for a, b in zip(left_s, left_t, strict=True))
    return temperature**2 * loss, sum(a for a, _ in common), sum(b for _, b in common)


PLAIN = {"xtoken_p": plain_p, "xtoken_h": plain_h}


def expected(
    name: str,
    w: np.ndarray,
    s: Tensor,
    t: Tensor,
    size: int,
    temperature: float,
    stop_s: list[int] = STOP_S,
    stop_t: list[int] = STOP_T,
) -> list[tuple[float, float, float]]:
    return [PLAIN[name](w, a, b, size, temperature, stop_s, stop_t) for a, b in zip(s, t, strict=True)]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("size", [1, 3, 99])
@pytest.mark.parametrize("name", NAMES)
def test_each_is_its_definition(name: str, size: int, temperature: float) -> None:
    s, t = logits(6, 13, 0), logits(6, 13, 1)
    option = {"top_k" if name == "xtoken_p" else "rest": size}
    objective = make(name, kd_temperature=temperature, **option)
    values = objective(s, t)
    wanted = expected(name, dense(objective.projection), s, t, size, temperature)
    assert values.loss.tolist() == pytest.approx([e[0] for e in wanted], abs=1e-12)
    assert values.metrics["mass_s"].tolist() == pytest.approx([e[1] for e in wanted], abs=1e-12)
    assert values.metrics["mass_t"].tolist() == pytest.approx([e[2] for e in wanted], abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_projection_gives_another_value(name: str) -> None:
    """W transposed, or with equal weights for all pieces."""
    s, t = logits(6, 13, 2), logits(6, 13, 3)
    objective = make(name)
    w = dense(objective.projection)
    flat = (w > 0) / np.maximum((w > 0).sum(1, keepdims=True), 1)
    right = objective(s, t).loss.tolist()
    assert right == pytest.approx([e[0] for e in expected(name, w, s, t, 99, 1.0)], abs=1e-12)
    for wrong in (w.T, flat):
        differences = [abs(e[0] - r) for e, r in zip(expected(name, wrong, s, t, 99, 1.0), right, strict=True)]
        assert min(differences) > 1e-4


@pytest.mark.parametrize(("stop_s", "stop_t"), [([4, 8, 9], [4]), ([4, 9], [4, 6])])
@pytest.mark.parametrize("name", NAMES)
def test_a_token_that_stops_one_side_only_counts_once(name: str, stop_s: list[int], stop_t: list[int]) -> None:
    """`<s>` ends a turn of one side. W takes it for the other's `<s>`, but its mass is in the stop column."""
    s, t = logits(4, 13, 35), logits(4, 13, 36)
    by_name = Projection.build(STUDENT, TEACHER, speller(TEACHER, SPELLINGS))
    assert dense(by_name)[8, 6] == 1
    values = make(name, Pair.of(STUDENT, TEACHER, stop_s, stop_t), projection=by_name)(s, t)
    wanted = expected(name, dense(by_name), s, t, 99, 1.0, stop_s, stop_t)
    assert values.loss.tolist() == pytest.approx([e[0] for e in wanted], abs=1e-12)
    assert values.metrics["mass_s"].tolist() == pytest.approx([e[1] for e in wanted], abs=1e-12)


def test_push_forward_conserves_the_mass_of_the_tokens_that_can_be_written() -> None:
    objective = make("xtoken_p", top_k=0)
    s = logits(5, 13, 4)
    p = s.softmax(-1)
    lost = p[:, [11, 12]].sum(-1)  # what the teacher cannot write, and a padding row
    torch.testing.assert_close(objective(s, logits(5, 13, 5)).metrics["mass_s"], 1 - lost, rtol=0, atol=1e-7)


def same_pair() -> Pair:
    pair = Pair.of(STUDENT, STUDENT, STOP_S, STOP_S)
    assert pair.same
    return pair


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 4])
def test_p_kl_of_equal_vocabularies_is_the_forward_kl_on_the_chosen_columns(top_k: int, temperature: float) -> None:
    s, t = logits(5, 13, 6).requires_grad_(), logits(5, 13, 7)
    losses = make("xtoken_p", same_pair(), top_k=top_k, kd_temperature=temperature)(s, t).loss
    text = [i for i in range(12) if i not in STOP_S]  # id 12 is padding
    best = t[:, text].topk(top_k or len(text), dim=-1).indices
    columns = [
        torch.cat([x[:, text].gather(-1, best), x[:, STOP_S].logsumexp(-1, keepdim=True)], -1)
        for x in (s / temperature, t / temperature)
    ]
    wanted = temperature**2 * generalized_jsd(*(x.log_softmax(-1) for x in columns), 0.0)
    torch.testing.assert_close(losses, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), s)[0] for x in (losses, wanted)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_equal_distributions_of_equal_vocabularies_cost_nothing_and_pull_nowhere(name: str) -> None:
    whole = vocabulary(b"a", b"1", b"12", b"\xf0", "<s>", "<end>", "<stop>")
    s = logits(5, 7, 8).requires_grad_()
    loss = make(name, Pair.of(whole, whole, [5, 6], [5, 6]), **FEW[name])(s, s.detach()).loss
    assert loss.abs().max() < 1e-14
    loss.sum().backward()
    assert s.grad is not None and s.grad.abs().max() < 1e-14


def test_the_least_value_of_h_kl_is_a_kink() -> None:
    """With a token outside the common part it is zero for equal distributions, and greater in every direction from
    there."""
    t = logits(1, 13, 8)
    objective = make("xtoken_h", same_pair())
    steps = torch.cat([torch.eye(13, dtype=torch.float64), -torch.eye(13, dtype=torch.float64)]) * 1e-3
    assert objective(t, t).loss.abs().max() < 1e-14
    assert objective(t + steps, t.expand(26, -1)).loss.min() > 0


@pytest.mark.parametrize("name", NAMES)
def test_numbering_does_not_matter(name: str) -> None:
    s, t = logits(5, 13, 9), logits(5, 13, 10)
    order_s, order_t = [7, 3, 11, 1, 9, 0, 5, 12, 2, 10, 4, 8, 6], [12, 5, 3, 0, 8, 1, 10, 7, 2, 11, 4, 6, 9]
    student, teacher = renumbered(STUDENT, order_s), renumbered(TEACHER, order_t)
    stop_s, stop_t = [order_s.index(i) for i in STOP_S], [order_t.index(i) for i in STOP_T]
    other = Pair.of(student, teacher, stop_s, stop_t, spell_t=speller(teacher, SPELLINGS))
    for options in ({}, FEW[name]):
        one = make(name, **options)(s, t)
        two = make(name, other, **options)(s[:, order_s], t[:, order_t])
        torch.testing.assert_close(one.loss, two.loss, rtol=0, atol=1e-12)
        torch.testing.assert_close(one.metrics["mass_s"], two.metrics["mass_s"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("options", [{}, None])
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_the_derivative(name: str, options: dict[str, Any] | None, temperature: float) -> None:
    s, t = logits(3, 13, 11).requires_grad_(), logits(3, 13, 12)
    objective = make(name, kd_temperature=temperature, **(FEW[name] if options is None else options))
    assert torch.autograd.gradcheck(lambda x: objective(x, t).loss, (s,))


@pytest.mark.parametrize("name", NAMES)
def test_a_row_depends_on_itself_alone(name: str) -> None:
    """Another top column in one row, or another block size, changes nothing in the others."""
    s, t = logits(6, 13, 13).requires_grad_(), logits(6, 13, 14)
    objective = make(name, **FEW[name])
    whole = objective(s, t).loss
    (gradient,) = torch.autograd.grad(whole[2], s)
    assert gradient[2].abs().max() > 0
    assert gradient[[0, 1, 3, 4, 5]].abs().max() == 0
    other = torch.where(torch.arange(6)[:, None] == 2, t, -3 * t)
    torch.testing.assert_close(objective(s, other).loss[2], whole[2], rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_and_rows_of_weight_zero_leave_the_sum_as_it_is(name: str) -> None:
    hidden_s, hidden_t = normal(7, 5, seed=15).requires_grad_(), normal(7, 4, seed=16)
    head_s, head_t = Head(linear(5, 13, 17)), Head(linear(4, 13, 19))
    rows, weight = torch.arange(7), torch.tensor([1.0, 0.0, 0.5, 2.0, 0.0, 1.0, 0.1], dtype=torch.float64)
    objective = make(name, **FEW[name])
    runs = []
    for chunk_rows in (1, 3, 64):
        total, _ = reduce_rows(objective, hidden_s, head_s, hidden_t, head_t, rows, rows, weight, chunk_rows)
        runs.append((total, torch.autograd.grad(total, hidden_s)[0]))
    for total, gradient in runs:
        torch.testing.assert_close(total, runs[0][0], rtol=0, atol=1e-12)
        torch.testing.assert_close(gradient, runs[0][1], rtol=0, atol=1e-12)
        assert (gradient[[1, 4]] == 0).all()


def test_p_kl_does_not_underflow() -> None:
    """In float32 `exp(-150)` is zero; the student still learns where its distribution lacks the teacher's mass."""
    s, t = logits(4, 13, 21), logits(4, 13, 22)
    s[:, [1, 3, 5]] -= 150.0  # all that the teacher's `1` comes from
    t[:, 0] += 8.0
    losses, gradients = [], []
    for dtype in (torch.float64, torch.float32):
        x = s.to(dtype).requires_grad_()
        loss = make("xtoken_p")(x, t.to(dtype)).loss
        losses.append(loss.double())
        gradients.append(torch.autograd.grad(loss.sum(), x)[0].double())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
    assert losses[0].min() > 10


@pytest.mark.parametrize("name", NAMES)
def test_dead_columns_give_no_nan(name: str) -> None:
    s, t = logits(3, 13, 23), logits(3, 13, 24)
    s[0, [2, 10]] = -math.inf  # all that the teacher's `b` comes from
    t[0, 7] = -math.inf
    s[1, 11] = t[1, 10] = -math.inf
    s.requires_grad_()
    loss = make(name)(s, t).loss
    loss.sum().backward()
    assert loss.isfinite().all()
    assert s.grad is not None and s.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_computed_in_float32(name: str) -> None:
    s, t = logits(3, 13, 25).bfloat16(), logits(3, 13, 26).bfloat16()
    values = make(name)(s, t)
    assert values.loss.dtype == torch.float32
    torch.testing.assert_close(values.loss.double(), make(name)(s.double(), t.double()).loss, rtol=1e-5, atol=1e-5)


def test_h_kl_is_never_negative_though_its_parts_may_be() -> None:
    s, t = logits(400, 13, 27, scale=3.0), logits(400, 13, 28, scale=3.0)
    assert make("xtoken_h")(s, t).loss.min() > 0
    assert make("xtoken_h", rest=0)(s, t).loss.min() < -0.1


def test_of_colliding_tokens_the_heaviest_then_the_shortest_is_common() -> None:
    student = vocabulary(b"123", b"1", b"21", b"213", b"22", "<end>")
    teacher = vocabulary(b"1", b"2", b"3", "<end>")
    pair = Pair.of(student, teacher, [5], [3], spell_t=speller(teacher))
    objective = make("xtoken_h", pair)
    # "22" is written with "2" alone: weight 1. "1" has equal bytes. Nothing begins with "3".
    assert (objective.common_s.tolist(), objective.common_t.tolist()) == ([1, 4], [0, 1])
    student = vocabulary(b"231", b"23", b"21", "<end>")
    pair = Pair.of(student, teacher, [3], [3], spell_t=speller(teacher))
    objective = make("xtoken_h", pair)
    assert (objective.common_s.tolist(), objective.common_t.tolist()) == ([2], [1])


def written_side(ends: list[int], exact: list[bool]) -> tuple[Side, WrittenSide]:
    n = len(ends)
    made = Side(np.array(ends), np.zeros(n, np.int64), np.array(exact), np.arange(n) == n - 1)
    return made, WrittenSide(np.zeros(n, np.int64), made.end, made.segment, made.exact, made.stop)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_the_last_tokens_of_exact_chunks(name: str) -> None:
    """Chunks: (2, 3)|(1, 3), then 5|(4, 5) with an inexact teacher token, 7|7, stop."""
    side_s, mine = written_side([2, 3, 5, 7, 8], [True] * 5)
    side_t, theirs = written_side([1, 3, 4, 5, 7, 8], [True, True, True, False, True, True])
    written = Written(mine, theirs, align(side_s, side_t, 1), [b"0123456"])
    rows = make(name).rows(written)
    assert (rows.student.tolist(), rows.teacher.tolist()) == ([1, 3, 4], [1, 4, 5])
    assert rows.items == 3 and not rows.inputs


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_projection_is_used_and_one_of_another_pair_refused(name: str, tmp_path: Path) -> None:
    s, t = logits(3, 13, 29), logits(3, 13, 30)
    built = make(name).projection
    used = built.ids >= 0
    flat = replace(built, weights=(used / np.maximum(used.sum(1, keepdims=True), 1)).astype(np.float32))
    flat.save(tmp_path)
    bare = Pair.of(STUDENT, TEACHER, STOP_S, STOP_T)  # no speller: not needed
    losses = make(name, bare, projection=str(tmp_path))(s, t).loss
    torch.testing.assert_close(losses, make(name, bare, projection=flat)(s, t).loss, rtol=0, atol=0)
    assert (losses - make(name)(s, t).loss).abs().min() > 1e-6
    with pytest.raises(VocabularyError, match="another teacher"):
        make(name, Pair.of(STUDENT, vocabulary(b"a"), STOP_S, [0]), projection=str(tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_work_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"has no spell_t: pass spell_t=.* or projection=FOLDER"):
        make(name, Pair.of(STUDENT, TEACHER, STOP_S, STOP_T))
    with pytest.raises(ConfigError, match="has no vocabularies"):
        make(name, replace(PAIR, tables=None))
    with pytest.raises(ConfigError, match="the teacher has an empty stop set"):
        make(name, replace(PAIR, stop_t=torch.tensor([], dtype=torch.int64)))
    with pytest.raises(ConfigError, match="kd_temperature=0"):
        make(name, kd_temperature=0)
    with pytest.raises(ConfigError, match="is negative"):
        make(name, **{"top_k" if name == "xtoken_p" else "rest": -1})
    strangers: Vocabulary = vocabulary(b"x", "<e>")
    with pytest.raises(ConfigError, match="W maps none of the student's 2 tokens"):
        make(name, Pair.of(strangers, TEACHER, [1], STOP_T, spell_t=speller(TEACHER)))


@pytest.mark.parametrize("name", NAMES)
def test_all_that_it_holds_moves_with_it(name: str) -> None:
    objective = make(name)
    objective.to("meta")
    held = [x for x in vars(objective).values() if isinstance(x, Tensor)]
    assert held and all(x.device.type == "meta" for x in [*held, objective.pair.stop_s])
    assert objective(logits(2, 13, 31).to("meta"), logits(2, 13, 32).to("meta")).loss.shape == (2,)


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_give_no_values_and_metrics_carry_no_gradient(name: str) -> None:
    empty = make(name)(torch.zeros(0, 13, requires_grad=True), torch.zeros(0, 13))
    assert empty.loss.shape == empty.metrics["mass_s"].shape == (0,)
    empty.loss.sum().backward()
    values = make(name)(logits(2, 13, 33).requires_grad_(), logits(2, 13, 34))
    assert values.loss.requires_grad and not any(x.requires_grad for x in values.metrics.values())
    assert type(make(name)).depends_on_split
