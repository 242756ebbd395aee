"""The loss stage takes as much memory for many rows as for few."""

from __future__ import annotations

import subprocess
import sys

import pytest

# `rows` rows of 2 x 40,000 columns, 64 at a time; prints by how many MiB the process grew at most.
STAGE = """
import re, sys, torch
from diglot.heads import Head, reduce_rows, summaries
from diglot.objectives import Values
torch.set_num_threads(1)
what, rows = sys.argv[1], int(sys.argv[2])
head_s, head_t = (Head(torch.nn.Linear(4, 40_000, bias=False)) for _ in range(2))
hidden, index = torch.randn(rows, 4, requires_grad=True), torch.arange(rows)

def objective(logits_s, logits_t):
    gap = logits_s.log_softmax(-1) - logits_t.log_softmax(-1)
    return Values((logits_s.softmax(-1) * gap).sum(-1), {"first": gap[:, 0], "last": gap[:, -1]})

def distribution(logits, block):
    return logits.log_softmax(-1)[:, :3]

def peak():
    # Not `ru_maxrss`, in which the process that started this one counts too.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

start = peak()
if what == "rows":
    reduce_rows(objective, hidden, head_s, hidden.detach(), head_t, index, index, torch.ones(rows), 64)[0].backward()
else:
    summaries(distribution, hidden, head_s, 64).sum().backward()
print(peak() - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("what", ["rows", "summaries"])
def test_memory_does_not_grow_with_the_number_of_rows(what: str) -> None:
    peaks = []
    for rows in (256, 4096):
        done = subprocess.run(
            [sys.executable, "-c", STAGE, what, str(rows)], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        peaks.append(float(done.stdout))
    few, many = peaks
    assert few > 5  # something was measured
    assert many < few + 64  # of 15 MiB that came and went; the logits of 4,096 rows take 625 MiB a side
