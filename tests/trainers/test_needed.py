"""Only what is needed is computed: little padding, no logits of prompts, and the results stay what they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support.tokenizers_zoo as zoo
import torch
from support import tiny
from torch import Tensor

from diglot.batches import lengths
from diglot.comparisons import Answers, Batch
from diglot.heads import Head, last_hidden
from diglot.objectives import OBJECTIVES
from diglot.trainers import base
from diglot.watching.observing import in_order_of_data as as_the_data

BALANCED = {name for name, cls in OBJECTIVES.items() if cls.depends_on_split}


def rows_of_many_lengths(count: int = 8) -> list[dict[str, Any]]:
    """Long and short by turns, so that every micro-batch in the order of the data has one of each."""
    words = [40 if i % 2 else 2 + i for i in range(count)]
    return [{"prompt": f"Say it, {i}.", "completion": " naïve word" * n} for i, n in enumerate(words)]


def window(trainer: Any, rows: list[dict[str, Any]], size: int = 2) -> list[Batch]:
    batches = [trainer.data_collator(rows[i : i + size]) for i in range(0, len(rows), size)]
    return [b["batch"] for b in trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)[0]]


def learned(trainer: Any, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    trainer.model.zero_grad()
    losses = [trainer.compute_loss(trainer.model, {"batch": batch}) for batch in batches]
    sum(losses).backward()  # type: ignore[union-attr]
    results = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return sum(loss.item() for loss in losses), results


def in_order_of_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows are split as the data come."""
    monkeypatch.setattr(base, "by_length", lambda window, together: lengths.as_read(window))


def padded(batches: list[Batch]) -> int:
    return sum(b.student.input_ids.numel() + b.views[0].read.teacher.input_ids.numel() for b in batches)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-5 * float(a[name].abs().max() + 1e-3))


# ---- samples of similar length share a micro-batch -------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"jsd"}))
def test_sorting_by_length_changes_neither_loss_nor_gradient_nor_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Of every objective. Those whose factor is a batch's own ratio are not sorted."""
    results, logs = [], []
    for as_read in (False, True):
        if as_read:
            in_order_of_data(monkeypatch)
        trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.turns(), rows_of_many_lengths(), lmbda=0.0, objective=name)
        batches = window(trainer, rows_of_many_lengths())
        assert [len(b.pairs) for b in batches] == [2, 2, 2, 2]
        results.append((*learned(trainer, batches), padded(batches)))
        logs.append(trainer.metrics.take(trainer.count_over_ranks))
    (loss, result, less), (expected, gradient, more) = results
    assert less == more if name in BALANCED else less < 0.8 * more
    assert loss == pytest.approx(expected, rel=1e-5)
    same(result, gradient)
    assert logs[0].keys() == logs[1].keys()
    for key, value in logs[1].items():
        if not key.endswith("mass_t"):  # measured on some rows of each block only
            assert logs[0][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_sorting_changes_nothing_for_minillm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole steps with inner epochs: the same samples, losses, norms and logged numbers."""
    logs = []
    for as_read in (False, True):
        if as_read:
            in_order_of_data(monkeypatch)
        trainer = tiny.minillm(
            tmp_path,
            zoo.chatml(),
            zoo.turns(),
            max_steps=4,
            num_iterations=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            max_completion_length=24,
        )
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    for entry, expected in zip(*logs, strict=True):
        for key in expected.keys() - {"single_step/mass_t"}:
            assert entry[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-5), key


def test_dropped_samples_stay_in_their_micro_batch_and_completions_of_a_prompt_together() -> None:
    class Pair:
        def __init__(self, length: int) -> None:
            self.student = self.teacher = type("Rendered", (), {"ids": np.zeros(length)})

    sizes = [[9, 9], [None, None, 2, 7], [4, 4, 3, 1]]
    pairs = [[None if n is None else Pair(n) for n in batch] for batch in sizes]
    result = lengths.by_length(pairs, together=2)  # type: ignore[arg-type]
    shown = [[None if p is None else len(p.student.ids) for _, p in batch] for batch in result]
    assert shown == [[3, 1], [None, None, 4, 4], [2, 7, 9, 9]]
    assert sorted(place for batch in result for place, _ in batch) == list(range(10))
    alone = lengths.by_length(pairs)  # type: ignore[arg-type]
    assert [len(p.student.ids) for batch in alone for _, p in batch if p] == [1, 2, 3, 4, 4, 7, 9, 9]
    assert [[p is None for _, p in batch] for batch in alone] == [[n is None for n in batch] for batch in sizes]


def test_a_window_of_one_micro_batch_stays_as_the_data_have_it(tmp_path: Path) -> None:
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.turns(), lmbda=0.0)
    (batch,) = window(trainer, rows_of_many_lengths(), 8)
    assert batch.places == list(range(8))
    lengths_of_rows = [len(p.student.ids) for p in batch.pairs]
    assert lengths_of_rows != sorted(lengths_of_rows)


def test_the_table_of_completions_keeps_the_order_of_the_data(tmp_path: Path) -> None:
    """Through MiniLLM's checkpoint as well."""
    trainer = tiny.minillm(tmp_path, zoo.chatml(), zoo.turns(), num_iterations=2, teacher_mixed_alpha=0.0)
    lines = [" word" * 9, " a", " word" * 5, " b c"]
    ids = [e.ids for e in trainer.student_renderer.encoder.encode(lines)]
    trainer.sample = lambda conversations, prompts, seeds: ids  # type: ignore[method-assign]
    batches = window(trainer, tiny.PROMPT_ROWS[:4])
    spelt = [p.student.segment_bytes[-1].decode() for p in as_the_data(batches)]
    assert spelt == lines
    assert [p.student.segment_bytes[-1].decode() for b in batches for p in b.pairs] != lines
    from diglot.checkpoints.held import load_held, save_held
    from diglot.trainers.minillm import held_of

    save_held(tmp_path, 0, [held_of(batch, 0) for batch in batches])
    assert [held.places for held in load_held(tmp_path, 0) or []] == [batch.places for batch in batches]


# ---- no logits but those of scored rows ------------------------------------------------------------------------------


class FormedRows:
    """Records the hidden states of which a head forms logits, whole rows and single columns alike."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[Tensor] = []
        module = model.get_output_embeddings()
        module.register_forward_pre_hook(lambda _, args: self._see(args[0]))
        original = Head.columns

        def columns(head: Head, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if head.module is module:
                self._see(hidden)
            return original(head, hidden, *args, **kwargs)

        monkeypatch.setattr(Head, "columns", columns)

    def _see(self, hidden: Tensor) -> None:
        self.seen.append(hidden.detach().flatten(0, -2).clone())

    def places(self, hidden: Tensor) -> tuple[set[int], int]:
        """Which rows of `hidden` `[N, H]` they were, and how many were none of these."""
        formed = torch.cat(self.seen)
        distance, nearest = torch.cdist(formed.double(), hidden.double()).min(1)
        return set(nearest[distance < 1e-3].tolist()), int((distance >= 1e-3).sum())


OBJECTIVE_CASES = [("gkd", name) for name in sorted(set(OBJECTIVES) - {"jsd"})] + [("minillm", "auto")]


@pytest.mark.parametrize(("method", "objective"), OBJECTIVE_CASES)
def test_logits_are_formed_of_scored_rows_and_one_position_of_each_pass_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, objective: str
) -> None:
    """In both models. The one position is the last, which the model's own forward pass insists on."""
    make = tiny.gkd if method == "gkd" else tiny.minillm
    options = {"lmbda": 0.0} if method == "gkd" else {"teacher_mixed_alpha": 0.0}
    trainer = make(tmp_path, zoo.chatml(), zoo.turns(), tiny.CHAT_ROWS, objective=objective, **options)
    batches = window(trainer, tiny.CHAT_ROWS, 4)
    for batch in batches:
        view, teacher = batch.views[0], trainer.comparisons[0].teacher
        batch.views[0] = replace(view, answers=Answers(teacher, view.read.teacher))  # MiniLLM's know some already
        sides = ((trainer.model, batch.student), (teacher.model, view.read.teacher))
        formed = [FormedRows(model, monkeypatch) for model, _ in sides]
        trainer.compute_loss(trainer.model, {"batch": batch}).backward()
        for (model, side), rows in zip(sides, formed, strict=True):
            assert rows.seen or (objective == "ce" and model is not trainer.model)  # which asks nothing of a teacher
            if not rows.seen:
                continue
            with torch.no_grad():
                hidden = last_hidden(model, side.input_ids, side.attention_mask).flatten(0, 1)
            width = side.input_ids.shape[1]
            last = {width * (b + 1) - 1 for b in range(len(side.input_ids))}
            allowed = set(side.rows.tolist()) | last
            assert len(allowed) < side.input_ids.numel() / 2  # there are prompt rows to be caught
            places, other = rows.places(hidden)
            # dskd projects hidden states of scored tokens into the other model's space: one row for each of them.
            # covering reads the teacher behind its branches, and tries at first if it takes such a pass.
            more = {"dskd": 2 * max(len(s.rows) for _, s in sides)}
            covering = next((name for name, plan in view.plans.items() if hasattr(plan, "branch")), None)
            if covering is not None and model is not trainer.model:
                more[objective] = len(view.plans[covering].branch.ids) + len(side.input_ids) + 8
                allowed |= {width * b for b in range(len(side.input_ids))}  # padding that sees itself alone
            assert places <= allowed and other <= more.get(objective, 0)


@pytest.mark.parametrize("make", [tiny.gkd, tiny.minillm])
def test_no_cache_is_emptied_in_either_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    calls: list[int] = []
    for module in (torch.cuda, torch.mps, torch.xpu):
        monkeypatch.setattr(module, "empty_cache", lambda: calls.append(1))
    make(tmp_path, zoo.chatml(), zoo.inst(), tiny.CHAT_ROWS).train()
    assert not calls


def test_states_of_the_teacher_live_no_longer_than_their_loss_is_formed(tmp_path: Path) -> None:
    """Of a window's micro-batches one at a time is in memory, and each is read by the teacher once."""
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), objective=["strict", "sequence_kl"], lmbda=0.0)
    batches = window(trainer, rows_of_many_lengths(6))
    teacher: Any = trainer.comparisons[0].teacher
    read: list[Any] = []
    handle = teacher.model.register_forward_hook(lambda *_: read.append(1))
    alive = []
    for batch in batches:
        trainer.compute_loss(trainer.model, {"batch": batch}).backward()
        alive.append(sum("hidden" in vars(b.views[0].answers) for b in batches))
    handle.remove()
    assert alive == [0, 0, 0] and len(read) == 3


def test_states_that_later_steps_read_are_not_computed_again(tmp_path: Path) -> None:
    trainer = tiny.minillm(tmp_path, zoo.chatml(), zoo.inst(), objective="strict", num_iterations=3, max_steps=3)
    teacher: Any = trainer.comparisons[0].teacher
    read: list[Any] = []
    teacher.model.model.register_forward_hook(lambda *_: read.append(1))
    trainer.train()
    once = len(read)
    again = tiny.minillm(tmp_path / "one", zoo.chatml(), zoo.inst(), objective="strict", num_iterations=3, max_steps=1)
    other: Any = again.comparisons[0].teacher
    before = len(read)
    other.model.model.register_forward_hook(lambda *_: read.append(1))
    again.train()
    assert once == len(read) - before
