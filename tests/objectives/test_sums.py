"""Running sums are those of torch, in one order of addition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diglot.sums import running_sums_by_blocks


@pytest.mark.parametrize("count", [1, 3, 63, 64, 65, 130, 4096, 4097, 70_000])
def test_running_sums_in_blocks_are_the_running_sums(count: int) -> None:
    """To float64's rounding, with their gradient, and the same bits each time."""
    draw = torch.Generator().manual_seed(count)
    x = torch.randn(3, count, generator=draw, dtype=torch.float64).softmax(-1).requires_grad_()
    sums = running_sums_by_blocks(x)
    exact = torch.from_numpy(x.detach().numpy().astype(np.longdouble).cumsum(-1).astype(np.float64))
    torch.testing.assert_close(sums, exact, atol=1e-14, rtol=1e-14)
    assert torch.equal(sums, running_sums_by_blocks(x)) and torch.equal(sums[0], running_sums_by_blocks(x[0]))
    of_sums = torch.randn(3, count, generator=draw, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((sums * of_sums).sum(), x)
    torch.testing.assert_close(gradient, of_sums.flip(-1).cumsum(-1).flip(-1), atol=1e-9, rtol=1e-12)
