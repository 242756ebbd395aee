"""Mass is conserved: what an objective compares sums to one, on any text, whatever the two tokenizers are."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from support.scored import Scored

from diglot.objectives import make_objective
from diglot.objectives.byte import byte_distribution

UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=16)
MIXED = st.lists(
    st.one_of(UNICODE, st.sampled_from([" ", "  ", "\n", "\t", "ab", "12", "été", "数", "👩‍🚀"])), max_size=5
)
TEXTS = MIXED.map("".join)


def check_masses(scored: Scored) -> None:
    """Targets of bpm, cells of shared_prefix and distributions of byte sum to one; values and gradients are finite."""
    one = torch.ones((), dtype=scored.logits_s.dtype)
    bpm: Any = make_objective("bpm", scored.pair)
    rows, inputs = scored.rows_and_inputs(bpm)
    if len(rows.student):
        target, reached, _ = bpm.target(scored.logits_t[rows.teacher], **inputs)
        torch.testing.assert_close(target.sum(-1), one.expand(len(target)), rtol=0, atol=1e-5)
        cells = bpm.cells(scored.logits_s.detach()[rows.student], reached).exp().sum(-1)
        torch.testing.assert_close(cells, one.expand(len(cells)), rtol=0, atol=1e-5)
    byte: Any = make_objective("byte", scored.pair)
    plan = byte.plan(scored.batch.written)
    for summary, logits, side in (
        (byte.summary_s(plan), scored.logits_s.detach(), plan.student),
        (byte.summary_t(plan), scored.logits_t, plan.teacher),
    ):
        distribution, cut = byte_distribution(summary(logits, slice(0, len(logits))), side)
        torch.testing.assert_close(distribution.sum(-1), one.expand(len(distribution)), rtol=0, atol=1e-4)
        assert (cut > -1e-4).all()
    for name in ("bpm", "escd", "byte", "shared_prefix", "simct", "strict", "alm"):
        values = scored.values(name)
        assert values.loss.isfinite().all(), name
        if len(values.loss):
            assert scored.gradient(values.loss).isfinite().all(), name
