"""MiniLLM's expected gradient is that of the reverse KL over texts: every path of a tiny student, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny
from support.oracle import Toy, bpe_a, bpe_b, letters, unigram
from torch import Tensor

from diglot.comparisons import Batch, Term
from diglot.comparisons.auto import explained_by
from diglot.trainers import MiniLLMTrainer

PROMPT = "b"
# The paper's sum without what changes it on purpose: discount, division by lengths, whitening, clipping, mixing.
EXACT: dict[str, Any] = dict(
    gamma=1.0, length_normalization=False, whiten_advantages=False, teacher_mixed_alpha=0.0, epsilon=1e9,
    num_iterations=1, min_coverage=0.0, max_length=64,
)  # fmt: skip


def model(toy: Toy, seed: int) -> Any:
    made = tiny.tiny_model(toy.tokenizer, seed, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    return made.double()


def all_paths(toy: Toy, length: int) -> list[tuple[int, ...]]:
    """All that a student can write in at most `length` tokens: shorter ones with stop, the longest cut."""
    ids = [i for i, piece in enumerate(toy.pieces) if piece]
    ended = [(*path, toy.stop) for n in range(length) for path in itertools.product(ids, repeat=n)]
    return ended + list(itertools.product(ids, repeat=length))


def log_probs(net: Any, prompt: list[int], paths: list[tuple[int, ...]], temperature: float = 1.0) -> Tensor:
    """Of each path behind the prompt, nats, `[paths]`."""
    width = max(map(len, paths))
    ids = torch.tensor([[*prompt, *path, *[0] * (width - len(path))] for path in paths])
    written = torch.arange(width) < torch.tensor([len(path) for path in paths])[:, None]
    rows = (net(ids).logits / temperature).log_softmax(-1)[:, len(prompt) - 1 : -1]
    return (rows.gather(-1, ids[:, len(prompt) :, None])[..., 0] * written).sum(-1)


def flat(net: Any) -> Tensor:
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def prompt_of(toy: Toy) -> list[int]:
    return [*toy.canonical(PROMPT.encode())]


class Case:
    """A student, a teacher, every path, and the gradient of KL(student's paths || teacher's canonical reading)."""

    def __init__(
        self, student: Callable[[], Toy], teacher: Callable[[], Toy], length: int, temperature: float = 1.0
    ) -> None:
        self.s, self.t, self.length, self.temperature = student(), teacher(), length, temperature
        self.student, self.teacher = model(self.s, 1), model(self.t, 2)
        self.paths = all_paths(self.s, length)
        stops = [path[-1:] == (self.s.stop,) for path in self.paths]
        texts = [self.s.spell(path[:-1] if stop else path) for path, stop in zip(self.paths, stops, strict=True)]
        canonical = [
            (*self.t.canonical(x), *([self.t.stop] if end else [])) for x, end in zip(texts, stops, strict=True)
        ]
        read = self.paths if self.s is self.t else canonical  # with one table of ids the teacher reads the student's
        with torch.no_grad():
            self.logq = log_probs(self.teacher, prompt_of(self.t), read, temperature)
        logp = log_probs(self.student, prompt_of(self.s), self.paths, temperature)
        self.mass = logp.detach().exp()
        (logp.exp() * (logp - self.logq)).sum().backward()
        self.exact = flat(self.student)

    def expected(self, out: Path, change: Callable[[Batch], None] = lambda batch: None, **options: Any) -> Tensor:
        """Of all the trainer's terms, each path weighted with its probability."""
        rows = [{"prompt": PROMPT}] * len(self.paths)
        trainer: MiniLLMTrainer = tiny.minillm(
            out, self.s.tokenizer, self.t.tokenizer, rows, models=(self.student, self.teacher),
            **{**EXACT, "per_device_train_batch_size": len(rows), "max_completion_length": self.length,
               "temperature": self.temperature, "kd_temperature": self.temperature, **options},
        )  # fmt: skip
        ids = [np.array(path, dtype=np.int64) for path in self.paths]
        trainer.sample = lambda conversations, prompts, seeds: ids  # type: ignore[method-assign]
        made = trainer.get_batch_samples(iter([trainer.data_collator(rows)]), 1, trainer.args.device)[0]
        batch = made[0]["batch"]
        (view,) = batch.views
        whose = torch.div(batch.student.rows, batch.student.input_ids.shape[1], rounding_mode="floor")
        assert len(batch.pairs) == len(self.paths) and view.rollout is not None and view.read.written.usable_s.all()
        rollout = replace(view.rollout, weight=self.mass[whose])
        batch.views[0] = replace(view, rollout=rollout, counts=dict.fromkeys(view.counts, 1.0))
        self.trainer = trainer
        change(batch)
        self.student.zero_grad()
        trainer.compute_loss(trainer.model, {"batch": batch}).backward()
        return flat(self.student)

    def error(self, actual: Tensor) -> float:
        return float((actual - self.exact).norm() / self.exact.norm())


PAIRS = {
    "student_finer": (letters, bpe_a, 4),
    "student_finer_teacher_cuts_words": (letters, bpe_b, 4),
    "student_finer_unigram": (letters, unigram, 4),
    "student_coarser": (bpe_a, letters, 2),
    "overlapping": (bpe_a, bpe_b, 2),
    "overlapping_back": (bpe_b, bpe_a, 2),
    "equal": (bpe_a, bpe_a, 2),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_the_expected_gradient_is_that_of_the_reverse_kl(tmp_path: Path, pair: str) -> None:
    """With `letters` as the student every text has one path, so it is the KL between distributions over strings."""
    case = Case(*PAIRS[pair])
    assert case.mass.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert case.error(case.expected(tmp_path)) < 1e-6


@pytest.mark.parametrize("options", [{"top_k": 1}, {"canonical": False}], ids=str)
def test_it_is_so_whatever_the_target_is(tmp_path: Path, options: dict[str, Any]) -> None:
    """One continuation of each row, or mass on what the student's tokenizer would not write: q sets the variance only.

    At half the weight as well: what is subtracted is what is added.
    """
    case = Case(*PAIRS["overlapping"])
    step = {"name": "covering", "beta": 1.0, "written_apart": False, "weight": 0.5, **options}
    assert case.error(case.expected(tmp_path, objective=[step])) < 1e-6


def test_it_is_so_at_a_temperature_at_which_both_write(tmp_path: Path) -> None:
    """The student's draws at `kd_temperature`: the KL is that of both sides' distributions at this temperature."""
    case = Case(*PAIRS["overlapping"], temperature=2.0)
    assert case.error(case.expected(tmp_path)) < 1e-6


def test_steps_that_explain_other_tokens_are_each_subtracted_where_they_do() -> None:
    """What a dense step adds is to be left out of the rewards, whatever another one leaves out."""
    nan = float("nan")

    def step(*gains: float, weight: float) -> Any:
        says = SimpleNamespace(is_single_step=True, explained=lambda plan, scores: torch.tensor(gains))
        return Term(f"step {weight}", weight, says)  # type: ignore[arg-type]

    terms = [step(1.0, 2.0, nan, nan, weight=1.0), step(8.0, nan, 4.0, nan, weight=0.5)]
    view: Any = SimpleNamespace(comparison=SimpleNamespace(terms=terms), plans=dict.fromkeys(t.name for t in terms))
    both = explained_by(view, None)  # type: ignore[arg-type]
    assert both is not None
    torch.testing.assert_close(both, torch.tensor([5.0, 2.0, 2.0, nan]), equal_nan=True)


def test_without_the_subtraction_the_gradient_is_another(tmp_path: Path) -> None:
    """The check can fail: own rewards left out and nothing put in their place, or both steps counted."""
    case = Case(*PAIRS["overlapping"])

    def unsubtracted(batch: Batch) -> None:
        rollout = batch.views[0].rollout
        assert rollout is not None and rollout.advantage is not None and rollout.explained is not None
        advantage = rollout.advantage + rollout.explained
        batch.views[0] = replace(batch.views[0], rollout=replace(rollout, advantage=advantage))

    assert case.error(case.expected(tmp_path, unsubtracted)) > 0.1
