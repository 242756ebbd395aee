"""Objectives of what was written."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diglot.alignment import Alignment, Side, align
from diglot.objectives import Pair, Path, make_objective

PAIR = Pair(False, 4, 5, torch.tensor([0, 1]), torch.tensor([2, 1]), torch.tensor([3]), torch.tensor([4]))


def alignment() -> Alignment:
    """Segment 0: student 3 tokens, teacher 2; segment 1: its second chunk inexact; segment 2: nothing shared."""
    student = Side(
        end=np.array([2, 5, 6, 3, 6, 2]),
        segment=np.array([0, 0, 0, 1, 1, 2]),
        exact=np.array([1, 1, 1, 1, 0, 1], dtype=bool),
        stop=np.array([0, 0, 1, 0, 0, 0], dtype=bool),
    )
    teacher = Side(
        end=np.array([5, 6, 1, 3, 6, 3]),
        segment=np.array([0, 0, 1, 1, 1, 2]),
        exact=np.ones(6, dtype=bool),
        stop=np.array([0, 1, 0, 0, 0, 0], dtype=bool),
    )
    return align(student, teacher, 3).to("cpu")


LOGP_S = [-1.0, -2.0, -0.5, -3.0, -7.0, -8.0]
LOGP_T = [-2.0, -0.3, -0.25, -1.0, -9.0, -4.0]


def test_sequence_kl_is_half_the_squared_gap_of_means_over_exact_chunks() -> None:
    logp_s = torch.tensor(LOGP_S, dtype=torch.float64, requires_grad=True)
    values, mask = make_objective("sequence_kl", PAIR)(
        Path(logp_s, torch.tensor(LOGP_T, dtype=torch.float64)), alignment()
    )
    gaps = [-3.5 / 3 + 2.3 / 2, -3.0 + 1.25 / 2]
    assert mask.tolist() == [True, True, False]
    assert values.metrics["sequence_kl"][:2].tolist() == pytest.approx(gaps)
    assert values.loss[:2].tolist() == pytest.approx([0.5 * gap**2 for gap in gaps])
    values.loss[mask].sum().backward()
    assert logp_s.grad is not None
    # gap * d mean / d logp: tokens in inexact chunks or in no chunk get nothing.
    assert logp_s.grad.tolist() == pytest.approx([gaps[0] / 3] * 3 + [gaps[1], 0.0, 0.0])


def test_sequence_kl_lets_no_gradient_into_the_teacher() -> None:
    logp_t = torch.tensor(LOGP_T, requires_grad=True)
    values, _ = make_objective("sequence_kl", PAIR)(Path(torch.tensor(LOGP_S, requires_grad=True), logp_t), alignment())
    values.loss.sum().backward()
    assert logp_t.grad is None


def test_cross_entropy_is_the_surprisal_of_every_token_stop_included() -> None:
    values, mask = make_objective("ce", PAIR)(Path(torch.tensor(LOGP_S), torch.tensor(LOGP_T)), alignment())
    assert values.loss.tolist() == pytest.approx([-x for x in LOGP_S])
    assert mask.all()


@pytest.mark.parametrize("name", ["alm", "ce", "sequence_kl", "span"])
def test_the_mask_is_known_without_log_probs_and_is_the_one_returned(name: str) -> None:
    objective = make_objective(name, PAIR)
    values, mask = objective(Path(torch.tensor(LOGP_S), torch.tensor(LOGP_T)), alignment())
    assert mask.dtype == torch.bool
    assert torch.equal(mask, objective.mask(alignment()))
    assert mask.shape == values.loss.shape
    assert all(metric.shape == mask.shape for metric in values.metrics.values())


@pytest.mark.parametrize("name", ["alm", "ce", "sequence_kl", "span"])
def test_nothing_written_gives_no_values(name: str) -> None:
    none = Side(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, bool), np.zeros(0, bool))
    values, mask = make_objective(name, PAIR)(Path(torch.zeros(0), torch.zeros(0)), align(none, none, 0).to("cpu"))
    assert len(values.loss) == len(mask) == 0
