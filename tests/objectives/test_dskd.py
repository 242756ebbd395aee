"""Dual-space distillation: three parts, each with its gradient where it belongs; projectors in a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
import torch
from support import tiny
from support.row_problem import H_T, N_T, PAIR, ROWS_S, ROWS_T, H, N, Problem, V, normal

from diglot.errors import ConfigError
from diglot.heads import reduce_rows
from diglot.objectives import Pair, Rows
from diglot.objectives.dskd import DSKD, least_squares

LABEL = torch.tensor([1, 4, 2, 9, 0, 5, 12, 3, 8])


def labels(problem: Problem, objective: DSKD) -> torch.Tensor:
    """What the projected teacher finds likeliest at every other row, other tokens between."""
    best = problem.head_s(problem.hidden_t[ROWS_T] @ objective.projectors["t_to_s"]).argmax(-1)
    other = torch.where(best == LABEL, (LABEL + 1) % V, LABEL)
    return torch.where(torch.arange(len(LABEL)) % 2 == 0, best, other)


def parts(problem: Problem, objective: DSKD) -> dict[str, Any]:
    heads = {"student": problem.head_s, "frozen_student": problem.head_s.as_frozen(), "teacher": problem.head_t}
    problem.head_t.module.requires_grad_(False)
    reduced = {}
    known = Rows(ROWS_S, ROWS_T, {"label": labels(problem, objective)})
    for part in objective.parts(known, problem.hidden_s, problem.hidden_t):
        rows = (part.rows_left, part.rows_right, torch.ones(len(LABEL), dtype=torch.float64), 4)
        reduced[part.name] = reduce_rows(
            part.compare,
            part.left,
            heads[part.left_head],
            part.right,
            heads[part.right_head],
            *rows,
            inputs=part.inputs,
        )
    return reduced


@pytest.fixture
def prepared() -> tuple[Problem, DSKD]:
    problem, objective = Problem(), DSKD(PAIR)
    objective.prepare(problem.head_s.module.weight, problem.head_t.module.weight)
    for p in objective.projectors.values():
        p.data = p.data.double()
    problem.hidden_s.data *= 0.3
    return problem, objective


def test_the_three_parts_are_those_of_the_paper(prepared: tuple[Problem, DSKD]) -> None:
    problem, objective = prepared
    reduced = parts(problem, objective)
    t_to_s, s_to_t = objective.projectors["t_to_s"], objective.projectors["s_to_t"]
    h_s, h_t = problem.hidden_s[ROWS_S], problem.hidden_t[ROWS_T]
    logq = problem.head_s(h_t @ t_to_s).log_softmax(-1)
    logp = problem.head_s(h_s).log_softmax(-1)
    label = labels(problem, objective)
    right = logq.argmax(-1) == label
    assert right.sum() == 5
    student = ((logq.exp() * (logq - logp)).sum(-1) * right).sum()
    surprisal = -logq.gather(-1, label[:, None]).sum()
    logq_t, logp_t = problem.head_t(h_t).log_softmax(-1), problem.head_t(h_s @ s_to_t).log_softmax(-1)
    teacher = (logq_t.exp() * (logq_t - logp_t)).sum()
    for name, expected in (("student_space", student), ("projector", surprisal), ("teacher_space", teacher)):
        torch.testing.assert_close(reduced[name][0], expected)


def test_each_gradient_goes_where_it_belongs(prepared: tuple[Problem, DSKD]) -> None:
    problem, objective = prepared
    inputs = [problem.hidden_s, *problem.head_s.parameters, *objective.projectors.values()]
    reached = {}
    for name, (total, _) in parts(problem, objective).items():
        gradients = torch.autograd.grad(total, inputs, allow_unused=True, retain_graph=True)
        reached[name] = [g is not None and bool(g.abs().sum() > 0) for g in gradients]
    #                          hidden weight bias  s_to_t t_to_s (names in order)
    names = list(objective.projectors)
    own = {n: [k == n for k in names] for n in names}
    assert reached["student_space"] == [True, True, True, False, False]
    assert reached["projector"] == [False, False, False, *own["t_to_s"]]
    assert reached["teacher_space"] == [True, False, False, *own["s_to_t"]]


def test_the_projectors_start_by_keeping_the_logits_of_shared_tokens() -> None:
    source, map_back = normal(9, 4, seed=1), normal(4, 6, seed=2)
    target = source @ map_back  # a space that can say all that the source says
    projector = least_squares(source, target, ridge=1e-9).double()
    hidden = normal(5, 4, seed=3)
    torch.testing.assert_close(hidden @ projector @ target.T, hidden @ source.T, rtol=1e-4, atol=1e-4)


def test_equal_models_give_zero_in_both_spaces() -> None:
    problem = Problem(torch.float32)
    ids = torch.arange(V - 2)
    objective = DSKD(Pair(True, V, V, ids, ids, torch.tensor([V - 1]), torch.tensor([V - 1])))
    weight = problem.head_s.module.weight
    objective.prepare(weight, weight)
    torch.testing.assert_close(objective.projectors["t_to_s"].data, torch.eye(H), rtol=0, atol=1e-3)
    problem.hidden_t, problem.head_t = problem.hidden_s.detach()[ROWS_S], problem.head_s
    rows = Rows(ROWS_S, torch.arange(len(ROWS_S)), {"label": LABEL})
    of_student, _, of_teacher = objective.parts(rows, problem.hidden_s, problem.hidden_t)
    for part in (of_student, of_teacher):
        rows_of = (part.rows_left, part.rows_right, torch.ones(len(LABEL)), 4)
        total, _ = reduce_rows(
            part.compare, part.left, problem.head_s, part.right, problem.head_s, *rows_of, inputs=part.inputs
        )
        assert total.abs() < 1e-5


def test_sizes_of_the_problem_are_what_the_test_says() -> None:
    assert (N, N_T, H, H_T) == (12, 10, 5, 4)


def test_no_shared_tokens_are_refused() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ConfigError, match="shared tokens"):
        DSKD(Pair(False, 4, 5, none, none, torch.tensor([3]), torch.tensor([4])))


def test_projectors_train_and_resume_with_the_checkpoint_and_stay_out_of_the_student(tmp_path: Path) -> None:
    def trainer(folder: str, steps: int) -> Any:
        return tiny.gkd(
            tmp_path / folder, zoo.chatml(), zoo.inst(), objective="dskd", lmbda=0.0, max_steps=steps,
            save_strategy="steps", save_steps=2,
        )  # fmt: skip

    whole = trainer("whole", 4)
    start = {name: p.detach().clone() for name, p in whole.projectors.items()}
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / "projectors.safetensors").exists()
    assert all(not torch.equal(p, start[name]) for name, p in whole.projectors.items())
    resumed = trainer("resumed", 4)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, p in whole.projectors.items():
        torch.testing.assert_close(resumed.projectors[name], p, rtol=0, atol=0)
    reloaded = type(whole.model).from_pretrained(checkpoint)
    assert reloaded.state_dict().keys() == tiny.tiny_model(zoo.chatml()).state_dict().keys()


def test_a_checkpoint_of_another_objective_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = dict(lmbda=0.0, save_strategy="steps", save_steps=2, max_steps=2)
    tiny.gkd(tmp_path / "a", zoo.chatml(), zoo.inst(), **options).train()
    other = tiny.gkd(tmp_path / "b", zoo.chatml(), zoo.inst(), objective="dskd", **{**options, "max_steps": 4})
    with pytest.raises(ConfigError, match=r"objective\.terms is"):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
