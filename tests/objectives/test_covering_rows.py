"""What is read of the teacher's rows."""

from __future__ import annotations

import pytest
import torch

from diglot.objectives.covering_rows import _RUN, _likeliest


@pytest.mark.parametrize("count", [1, 8, 64])
@pytest.mark.parametrize("beyond", [0, 37])
def test_the_likeliest_columns_are_those_of_the_whole_row(count: int, beyond: int) -> None:
    """Many in one run of columns, some in what is left behind the last run, and some impossible."""
    logp = torch.randn(5, 100 * _RUN + beyond, generator=torch.Generator().manual_seed(count))
    logp[0, 7 * _RUN : 7 * _RUN + 90] += 20
    logp[1, -30:] += 20
    logp[2, ::3] = -torch.inf
    values, ids = _likeliest(logp, count)
    expected = logp.topk(count, dim=-1)
    assert logp.shape[1] // _RUN > count, "the short way is not tried"
    assert torch.equal(values, expected.values) and torch.equal(ids, expected.indices)
