"""Next-byte distributions and byte-prefix marginals against the truth of toy models."""

from __future__ import annotations

import pytest
import support.oracle_distributions as distributions
import torch
from support.oracle import bpe_a, letters
from support.oracle_readings import canonical_pair, perfect_pair


def test_byte_distributions_are_distributions_and_a_shift_by_one_byte_is_found() -> None:
    distribution, true, _ = distributions.byte_distributions(canonical_pair(bpe_a, letters))
    assert torch.allclose(distribution.sum(-1), torch.ones(len(distribution), dtype=distribution.dtype), atol=1e-9)
    assert float((distribution - true.roll(1, 0)).abs().max()) > 0.1
    stopped = distribution.clone()
    stopped[:, 256] = 0  # stop forgotten
    assert float((stopped - true).abs().max()) > 0.1


@pytest.mark.parametrize("how", ["greedy", "encode"])
def test_bpm_targets_are_distributions_over_the_students_cells(how: str) -> None:
    target, true, _ = distributions.bpm_targets(perfect_pair(bpe_a, letters), how)
    assert torch.allclose(target.sum(-1), torch.ones(len(target), dtype=target.dtype), atol=1e-6)
    assert torch.allclose(true.sum(-1), torch.ones(len(true), dtype=true.dtype), atol=1e-6)


def test_bpm_without_tokens_that_run_past_the_teachers_is_further_from_the_truth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The teacher writes single bytes, so every longer student token gets its mass from there."""
    reading = perfect_pair(bpe_a, letters)

    def distance() -> float:
        target, true, weight = distributions.bpm_targets(reading, "greedy")
        return distributions.mean((target - true).abs().sum(-1), weight)

    whole = distance()

    def nothing(self: object, rows: object, written: object, teller: object) -> dict[str, torch.Tensor]:
        count = len(rows.student)  # type: ignore[attr-defined]
        return {"span_column": torch.zeros(count, 0, dtype=torch.long), "span_mass": torch.zeros(count, 0)}

    monkeypatch.setattr(distributions.BPM, "extra", nothing)
    assert distance() > whole + 0.01
