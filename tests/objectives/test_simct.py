"""The divergence on shared tokens, stop and realised units, against a plain version."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import support.tokenizers_zoo as zoo
import torch
from support.chunk_problem import DOUBLE, side
from torch import Tensor

from diglot.alignment import Side, align
from diglot.batches import PairReader, Written, WrittenSide, align_pairs
from diglot.data import to_sample
from diglot.errors import ConfigError
from diglot.objectives import Pair, Path, Rows, Values, make_objective
from diglot.objectives.divergences import kl
from diglot.rendering import Renderer
from diglot.vocabulary import Vocabulary


def vocabulary(*tokens: str, stops: int) -> Vocabulary:
    raw = [t.encode() for t in tokens] + [b""] * stops
    control = np.array([not r for r in raw])
    names = {i: f"<stop {i}>" for i in range(len(tokens), len(raw))}
    offsets = np.concatenate([[0], np.cumsum([len(r) for r in raw])])
    return Vocabulary("byte-level", np.frombuffer(b"".join(raw), np.uint8), offsets, control, names)


STUDENT = vocabulary("a", "b", "c", "ab", "cd", "d", stops=2)
TEACHER = vocabulary("d", "b", "a", "c", "bcd", "cd", stops=1)
PAIR = Pair.of(STUDENT, TEACHER, [6, 7], [6])
SHARED = [(0, 2), (1, 1), (2, 3), (4, 5), (5, 0)]


def written_side(ids: list[int], cut: Side) -> WrittenSide:
    return WrittenSide(np.array(ids), cut.end, cut.segment, cut.exact, cut.stop)


def problem() -> Written:
    """Two texts. "abcd" as ab c d and a bcd, "a", "cd" as c d and cd, stop; then "b", inexact, and "ab" as ab and a b.

    Chunks: a unit of 3 and 2 tokens, a pair, what a shared token spells, stop; one left out, a unit of 1 and 2 tokens.
    """
    cut_s = side([2, 3, 4, 5, 6, 7, 8], [1, 3], inexact=[7], stopped=[0])
    cut_t = side([1, 4, 5, 7, 8], [1, 2, 3], stopped=[0])
    ids_s, ids_t = [3, 2, 5, 0, 2, 5, 7, 1, 3], [2, 4, 2, 5, 6, 1, 2, 1]
    return Written(written_side(ids_s, cut_s), written_side(ids_t, cut_t), align(cut_s, cut_t, 2), [b"abcdacd", b"bab"])


def simct(pair: Pair = PAIR):
    return make_objective("simct", pair)


def logits(written: Written, seed: int, pair: Pair = PAIR, dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor]:
    """Logits of the row that predicts each token, both sides."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (len(written.student.ids), pair.size_s), (len(written.teacher.ids), pair.size_t)
    s, t = (torch.randn(shape, generator=generator, dtype=DOUBLE).to(dtype) * 2 for shape in shapes)
    return s, t


def path_logp(of_side: Tensor, text: WrittenSide, stop: Tensor) -> Tensor:
    """Log-prob of each written token; of stop that of the whole set."""
    logp = of_side.log_softmax(-1)
    of_token = logp.gather(-1, torch.from_numpy(text.ids)[:, None]).squeeze(-1)
    return torch.where(torch.from_numpy(text.stop), logp[:, stop].logsumexp(-1), of_token)


class PathAlone:
    """A teller that knows the path alone."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def teacher_ranges(self, token: Tensor, low: Tensor, high: Tensor) -> Tensor:
        raise AssertionError("not asked by this objective")


def evaluated(s: Tensor, t: Tensor, written: Written, pair: Pair = PAIR) -> tuple[Rows, Values]:
    """The objective on every row, as a trainer runs it."""
    objective = simct(pair)
    rows = objective.rows(written)
    path = Path(path_logp(s, written.student, pair.stop_s), path_logp(t, written.teacher, pair.stop_t))
    inputs = {**rows.inputs, **objective.extra(rows, written, PathAlone(path))}
    return rows, objective(s[rows.student], t[rows.teacher], **inputs)


def plain(
    row_s: Tensor, row_t: Tensor, unit: tuple[list[float], list[float]] | None
) -> tuple[float, list[float], list[float]]:
    """KL of the two softmaxes over the candidates, from probabilities; `unit` holds each side's token log-probs."""
    p, q = row_s.softmax(-1).tolist(), row_t.softmax(-1).tolist()
    scores_s, scores_t = [p[i] for i, _ in SHARED], [q[j] for _, j in SHARED]
    scores_s.append(p[6] + p[7])
    scores_t.append(q[6])
    if unit is not None:
        for scores, logps in ((scores_s, unit[0]), (scores_t, unit[1])):
            scores.append(math.exp(sum(logps) / len(logps)))
    pi_s, pi_t = ([x / sum(scores) for x in scores] for scores in (scores_s, scores_t))
    return sum(a * math.log(a / b) for a, b in zip(pi_s, pi_t, strict=True)), scores_s, scores_t


def test_rows_open_every_exact_chunk_and_know_their_units() -> None:
    rows = simct().rows(problem())
    assert rows.student.tolist() == [0, 3, 4, 6, 8]
    assert rows.teacher.tolist() == [0, 2, 3, 4, 6]
    assert rows.inputs["unit"].tolist() == [True, False, False, False, True]
    assert rows.items == 5


def test_simct_is_its_definition() -> None:
    written = problem()
    s, t = logits(written, 0)
    rows, values = evaluated(s, t, written)
    logp_s = path_logp(s, written.student, PAIR.stop_s).tolist()
    logp_t = path_logp(t, written.teacher, PAIR.stop_t).tolist()
    units = [(logp_s[0:3], logp_t[0:2]), None, None, None, (logp_s[8:9], logp_t[6:8])]
    expected = [
        plain(s[i], t[j], unit) for i, j, unit in zip(rows.student.tolist(), rows.teacher.tolist(), units, strict=True)
    ]
    assert values.loss.tolist() == pytest.approx([e[0] for e in expected], abs=1e-12)
    assert values.metrics["mass_s"].tolist() == pytest.approx([sum(e[1][:6]) for e in expected])
    assert values.metrics["mass_t"].tolist() == pytest.approx([sum(e[2][:6]) for e in expected])
    assert values.metrics["unit"].tolist() == [1, 0, 0, 0, 1]


def test_the_gradient_is_the_derivative_through_rows_and_units() -> None:
    written = problem()
    s, t = logits(written, 1)
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: evaluated(x, t, written)[1].loss, (s,))


def test_every_token_of_a_unit_is_taught_and_the_teacher_is_not() -> None:
    written = problem()
    s, t = logits(written, 2)
    s.requires_grad_(), t.requires_grad_()
    rows, values = evaluated(s, t.detach(), written)
    values.loss.sum().backward()
    assert s.grad is not None and s.grad.isfinite().all()
    # Rows 1 and 2 are inside a unit; 5 is inside a chunk that a shared token spells, 7 in an inexact chunk: unread.
    assert (s.grad.abs().sum(-1) > 0).tolist() == [True, True, True, True, True, False, True, False, True]
    path = Path(path_logp(s, written.student, PAIR.stop_s), path_logp(t, written.teacher, PAIR.stop_t))
    assert not simct().extra(rows, written, PathAlone(path))["unit_t"].requires_grad


def test_a_unit_that_a_shared_token_spells_is_not_counted_twice() -> None:
    """ "cd" written as c d is the candidate "cd" already; without that token on the student's side it is a unit."""
    without = vocabulary("a", "b", "c", "ab", "zz", "d", stops=2)
    pair = Pair.of(without, TEACHER, [6, 7], [6])
    assert simct(pair).rows(problem()).inputs["unit"].tolist() == [True, False, True, False, True]


def test_stop_is_no_unit_even_behind_a_token_without_bytes() -> None:
    cut_s, cut_t = side([1, 1, 2], stopped=[0]), side([1, 2], stopped=[0])
    sides = written_side([0, 7, 7], cut_s), written_side([2, 6], cut_t)
    rows = simct().rows(Written(*sides, align(cut_s, cut_t, 1), [b"a"]))
    assert rows.student.tolist() == [0, 1] and rows.inputs["unit"].tolist() == [False, False]


def test_equal_vocabularies_and_distributions_give_no_loss() -> None:
    pair = Pair.of(STUDENT, STUDENT, [6, 7], [6, 7])
    text = problem()
    same = replace(text, teacher=text.student, alignment=align(side([1, 3], [2]), side([1, 3], [2]), 2))
    same = replace(same, student=written_side([0, 4, 3], side([1, 3], [2])), texts=[b"acd", b"ab"])
    same = replace(same, teacher=same.student)
    s, _ = logits(same, 3, pair)
    s.requires_grad_()
    _, values = evaluated(s, s.detach(), same, pair)
    assert values.loss.abs().max() < 1e-12
    assert torch.autograd.grad(values.loss.sum(), s)[0].abs().max() < 1e-12


def test_equal_distributions_over_text_do_not_make_it_zero() -> None:
    """ "ab" is equally likely, e^-2, as one token here and as two there: the scores are -2 and -1."""
    half = math.log(0.5)
    known = torch.full((1, 8), half).log_softmax(-1)
    alike = {"unit_s": torch.tensor([-2.0]), "unit": torch.tensor([True])}
    teacher = torch.full((1, 7), half).log_softmax(-1)
    by_mean = simct()(known, teacher, unit_t=torch.tensor([-1.0]), **alike).loss
    by_sum = simct()(known, teacher, unit_t=torch.tensor([-2.0]), **alike).loss
    assert by_mean.item() > 0.05 > by_sum.item()


def test_planted_faults_change_the_values() -> None:
    """A row one token late, stop read of one id, a unit that is dropped."""
    written = problem()
    s, t = logits(written, 4)
    _, right = evaluated(s, t, written)
    _, late = evaluated(s, t.roll(1, 0), written)
    assert not torch.isclose(late.loss, right.loss).any()
    _, stopless = evaluated(s, t, written, replace(PAIR, stop_s=torch.tensor([6])))
    assert not torch.isclose(stopless.loss, right.loss).any()
    objective = simct()
    rows = objective.rows(written)
    nothing = torch.zeros(5, dtype=DOUBLE)
    dropped = objective(
        s[rows.student], t[rows.teacher], unit=torch.zeros(5, dtype=torch.bool), unit_s=nothing, unit_t=nothing
    )
    assert torch.isclose(dropped.loss, right.loss).tolist() == [False, True, True, True, False]


def test_bfloat16_logits_are_compared_in_float32() -> None:
    written = problem()
    s, t = logits(written, 5, dtype=torch.bfloat16)
    losses = evaluated(s, t, written)[1].loss
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), evaluated(s.double(), t.double(), written)[1].loss, rtol=0.1, atol=0.02)


def test_no_rows_give_no_values() -> None:
    none = side([])
    nothing = WrittenSide(none.end, none.end, none.segment, none.exact, none.stop)
    written = Written(nothing, nothing, align(none, none, 0), [])
    _, values = evaluated(torch.zeros(0, 8), torch.zeros(0, 7), written)
    assert len(values.loss) == len(values.metrics["unit"]) == 0


def test_real_texts_have_units_whose_bytes_no_shared_token_has() -> None:
    sides = Renderer(zoo.chatml()), Renderer(zoo.turns())
    reader = PairReader(*sides, same_vocabulary=False)
    reply = "the water naïve 数学 was lapping at 1234 🚀"
    read = reader.written(to_sample({"prompt": "Say:", "completion": reply}, "row"))
    written = align_pairs([read], pad_s=0, pad_t=0, on_policy=False).written
    tables = [r.vocabulary for r in sides]
    pair = Pair.of(*tables, *[[r.stop_id] for r in sides])
    rows = simct(pair).rows(written)
    unit = rows.inputs["unit"]
    assert 0 < int(unit.sum()) < len(unit) == int(written.alignment.chunk_exact.sum())
    shared = {tables[0].token(i) for i in pair.shared_s.tolist()}
    for first, has in zip(rows.student.tolist(), unit.tolist(), strict=True):
        chunk = written.alignment.chunk_s[first]
        members = np.flatnonzero(written.alignment.chunk_s == chunk), np.flatnonzero(written.alignment.chunk_t == chunk)
        spelt = tables[0].bytes_of(written.student.ids[members[0]])
        if written.alignment.chunk_stop[chunk]:
            assert not has
        else:
            assert spelt == tables[1].bytes_of(written.teacher.ids[members[1]]) and spelt in reply.encode()
            assert has == ((len(members[0]) > 1 or len(members[1]) > 1) and spelt not in shared)
    s, t = logits(written, 6, pair)
    losses = evaluated(s.requires_grad_(), t, written, pair)[1].loss
    losses.sum().backward()
    assert (losses > 0).all() and s.grad is not None and s.grad.isfinite().all()


def test_kl_ignores_a_candidate_that_neither_side_has() -> None:
    logp = torch.tensor([[0.0, -math.inf]], requires_grad=True)
    loss = kl(logp.log_softmax(-1), torch.tensor([[0.0, -math.inf]]).log_softmax(-1))
    loss.sum().backward()
    assert loss.item() == 0 and logp.grad is not None and logp.grad.isfinite().all()


def test_a_pair_without_vocabularies_or_stop_is_refused() -> None:
    with pytest.raises(ConfigError, match="'simct' looks into tokens"):
        simct(replace(PAIR, tables=None))
    with pytest.raises(ConfigError, match="the student has an empty stop set"):
        simct(replace(PAIR, stop_s=PAIR.stop_s[:0]))
