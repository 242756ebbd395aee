"""Bias and variance of the gradients that MiniLLM and `span` estimate, on models small enough to enumerate.

    python benchmarks/credit.py steps                   # MiniLLM: what its single step does; every path enumerated
    python benchmarks/credit.py lengths 16 64 256       # span: credit by chunks and of the whole text

Both tables are of reverse KL at gamma 1, without clipping, whitening and length normalisation. Bias is relative to the
length of the true gradient; the deviation is that of one text's gradient, relative to the same.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("tests",)]

from support.oracle import bpe_a, bpe_b, letters, unigram  # noqa: E402
from torch import Tensor  # noqa: E402
from trainers.test_minillm_gradient import PAIRS, Case, flat, model  # noqa: E402

from diglot.batches import PairReader, align_pairs  # noqa: E402
from diglot.comparisons import Batch  # noqa: E402
from diglot.objectives.credit import span_advantages  # noqa: E402
from diglot.rendering import Conversation  # noqa: E402

STRICT = [{"name": "strict", "beta": 1.0, "top_k": 0, "residual": True}]
FORMS: dict[str, dict[str, Any]] = {
    "control variate": {},
    "replaced": {"objective": STRICT},
    "no single step": {"single_step_decomposition": False},
    "no single step, whole text": {"single_step_decomposition": False},
}


class PerPath:
    """A change of a batch that only keeps one path, and what it is credited with."""

    def __init__(self, form: str, path: int) -> None:
        self.form, self.path = form, path

    def __call__(self, batch: Batch) -> None:
        view = batch.views[0]
        rollout = view.rollout
        assert rollout is not None and rollout.advantage is not None
        alignment, advantage = view.read.alignment, rollout.advantage
        options: Any = dict(gamma=1.0, length_normalization=False)
        if (
            self.form == "replaced"
        ):  # rewards of one-to-one tokens left out, the divergence of these rows in their place
            pairs = alignment.pair_s
            own = torch.zeros_like(advantage)
            own[pairs] = (rollout.logp_t[alignment.pair_t] - rollout.logp_old[pairs]).to(own.dtype)
            advantage = advantage - own
        elif self.form.endswith("whole text"):
            advantage = span_advantages(rollout.logp_old, rollout.logp_t, alignment, credit="whole", **options)
        whose = torch.div(batch.student.rows, batch.student.input_ids.shape[1], rounding_mode="floor")
        weight = (whose == self.path).double()
        batch.views[0] = replace(view, rollout=replace(rollout, advantage=advantage, weight=weight))


def steps() -> None:
    print("| pair | form | bias | deviation |\n| --- | --- | ---: | ---: |")
    for name in ("student_finer", "overlapping", "student_coarser"):
        student, teacher, length = PAIRS[name]
        case = Case(student, teacher, min(length, 3))  # every path has a backward pass of its own
        size = case.exact.norm()
        for form, options in FORMS.items():
            per_path: list[Tensor] = []

            def each(batch: Batch, form: str = form, per_path: list[Tensor] = per_path, case: Case = case) -> None:
                view = batch.views[0]
                for path in range(len(case.paths)):
                    batch.views[0] = view
                    PerPath(form, path)(batch)
                    case.student.zero_grad()
                    case.trainer.compute_loss(case.student, {"batch": batch}).backward()
                    per_path.append(flat(case.student))

            with tempfile.TemporaryDirectory() as out:
                case.expected(Path(out), each, **options)
            gradients = torch.stack(per_path)
            mean = (case.mass[:, None] * gradients).sum(0)
            deviation = (case.mass * (gradients - mean).square().sum(-1)).sum().sqrt()
            bias = (mean - case.exact).norm() / size
            print(f"| {name} | {form} | {bias:.1e} | {deviation / size:.2f} |", flush=True)


REPLIES = (2, 4, 8, 192)  # to one prompt, of which the others' mean is subtracted


def _less(replies: int) -> str:
    return f"whole, less the mean of {replies - 1} others"


def lengths(sizes: list[int], count: int = REPLIES[-1]) -> None:
    """Texts of a fixed number of tokens, stop left out; the mean is known from samples only, so noise is taken off."""
    print("| pair | tokens | credit | bias | deviation |\n| --- | ---: | --- | ---: | ---: |")
    for s, t in ((letters(), bpe_b()), (bpe_a(), bpe_b()), (bpe_a(), unigram())):
        student, teacher = model(s, 1), model(t, 2)
        for size in sizes:
            torch.manual_seed(size)
            with torch.no_grad():
                ids = student.generate(
                    torch.full((count, 1), s.canonical(b"b")[0]), do_sample=True, max_new_tokens=size, top_k=0,
                    min_new_tokens=size, pad_token_id=s.stop,
                )[:, 1:].numpy()  # fmt: skip
            reader = PairReader(s.renderer, t.renderer, same_vocabulary=False)
            pairs = [reader.sampled(Conversation(None, "b"), row.astype(np.int64)) for row in ids]
            batch = align_pairs(pairs, pad_s=s.stop, pad_t=t.stop, on_policy=True)
            logp, per_text = [], []
            for net, side in ((student, batch.student), (teacher, batch.teacher)):
                with torch.no_grad():
                    hidden = net.model(side.input_ids, attention_mask=side.attention_mask)[0].flatten(0, 1)[side.rows]
                    rows = net.lm_head(hidden)
                    rows[:, s.stop if net is student else t.stop] = -torch.inf
                    rows = rows.log_softmax(-1)
                    logp.append(rows.gather(1, side.targets[:, None])[:, 0])
                    per_text.append((hidden, rows))
            hidden, rows = per_text[0]
            whose = torch.div(batch.student.rows, batch.student.input_ids.shape[1], rounding_mode="floor")
            score = torch.nn.functional.one_hot(batch.student.targets, rows.shape[1]).double() - rows.exp()
            by_credit = {}
            options: Any = dict(gamma=1.0, length_normalization=False, reward_clip=1e9)
            values = {
                credit: span_advantages(logp[0], logp[1], batch.alignment, credit=credit, **options)
                for credit in ("variance_reduced", "whole")
            }
            for replies in REPLIES:
                prompt = torch.arange(count) // replies
                values[_less(replies)] = span_advantages(
                    logp[0], logp[1], batch.alignment, credit="whole", prompt=prompt, **options
                )
            for name, value in values.items():
                of_text = torch.zeros(count, rows.shape[1], hidden.shape[1]).double()
                of_text.index_add_(0, whose, -(value[:, None] * score)[:, :, None] * hidden[:, None, :])
                by_credit[name] = of_text.flatten(1)
            base = by_credit[_less(count)]
            true = _squared_mean(base).clamp(min=0).sqrt()
            for name, gradients in by_credit.items():
                bias = _squared_mean(gradients - base).clamp(min=0).sqrt() / true
                deviation = gradients.var(0).sum().sqrt() / true
                print(f"| {s.name} <- {t.name} | {size} | {name} | {bias:.2f} | {deviation:.1f} |", flush=True)


def _squared_mean(samples: Tensor) -> Tensor:
    """The squared length of the mean, without the part that noise adds (a U-statistic)."""
    n = len(samples)
    return (samples.sum(0).square().sum() - samples.square().sum()) / (n * (n - 1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["steps"]:
        steps()
    else:
        lengths([int(size) for size in sys.argv[2:]] or [16, 64, 256])
