"""Nothing that is no finite number reaches the optimizer; the batch that caused it can be run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
import torch
from datasets import Dataset
from support import tiny

from diglot.errors import NonFiniteError
from diglot.trainers.replay import load_batches, replay, save_batches

MAKE = {"gkd": tiny.gkd, "minillm": tiny.minillm}
OPTIONS: dict[str, dict[str, Any]] = {"gkd": {"lmbda": 1.0}, "minillm": {"num_iterations": 1}}


def make(kind: str, out: Path, **options: Any) -> Any:
    common = dict(gradient_accumulation_steps=2, per_device_train_batch_size=2, max_steps=3)
    return MAKE[kind](out, zoo.chatml(), zoo.inst(), **{**common, **OPTIONS[kind], **options})


def poison(trainer: Any, step: int, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second micro-batch of `step` has a loss, or only a gradient, that is no number."""
    real, calls = trainer.batch_loss, [0]

    def batch_loss(model: Any, batch: Any) -> Any:
        loss = real(model, batch)
        calls[0] += 1
        if trainer.state.global_step != step or calls[0] % 2:
            return loss
        if what == "loss":
            return loss * float("nan")
        head = next(model.parameters())
        return loss + (head.sum() * 0.0 + 1e-30).log() * 0.0 + (head.sum() - head.sum().detach()).abs().sqrt() * 1.0

    monkeypatch.setattr(trainer, "batch_loss", batch_loss)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("kind", ["gkd", "minillm"])
def test_the_run_stops_before_the_step_and_names_the_rows(
    kind: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(kind, tmp_path)
    poison(trainer, 1, what, monkeypatch)
    after_one: dict[str, torch.Tensor] = {}
    step = trainer.get_batch_samples

    def watched(*arguments: Any) -> Any:
        after_one.update(tiny.parameters(trainer.model))
        return step(*arguments)

    monkeypatch.setattr(trainer, "get_batch_samples", watched)
    with pytest.raises(
        NonFiniteError, match=r"of step 1 is \w+, expected a finite number \(rows: row .*, row"
    ) as error:
        trainer.train()
    assert ("The gradient norm" if what == "gradient" else "The loss") in str(error.value)
    assert all(torch.equal(after_one[n], p) for n, p in trainer.model.named_parameters())
    record = json.loads((tmp_path / "nonfinite" / "step-1-rank-0" / "batches.json").read_text())
    assert len(record["batches"]) == (1 if what == "loss" else 2) and len(record["rows"]) == 4 and record["step"] == 1


@pytest.mark.parametrize("kind", ["gkd", "minillm"])
def test_a_skipped_step_changes_nothing_and_is_counted(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither parameters nor the optimizer's averages, which weight decay and momentum would move."""
    trainer = make(kind, tmp_path, on_nonfinite="skip", weight_decay=0.1)
    poison(trainer, 1, "loss", monkeypatch)
    states: list[dict[str, torch.Tensor]] = []
    step = trainer.get_batch_samples

    def watched(*arguments: Any) -> Any:
        state = trainer.optimizer.state_dict()["state"]
        moments = {f"{i}.{n}": torch.as_tensor(v).clone() for i, one in state.items() for n, v in one.items()}
        states.append({**tiny.parameters(trainer.model), **moments})
        return step(*arguments)

    monkeypatch.setattr(trainer, "get_batch_samples", watched)
    trainer.train()
    assert trainer.state.global_step == 3 and trainer.finite.skipped == 1
    assert all(torch.equal(states[1][n], states[2][n]) for n in states[1])  # before and behind the skipped step
    assert any(not torch.equal(p, states[2][n]) for n, p in trainer.model.named_parameters())
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry.get("nonfinite_steps", 0.0) for entry in logs] == [0.0, 1.0, 0.0]
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in logs)


@pytest.mark.parametrize("kind", ["gkd", "minillm"])
def test_a_saved_batch_gives_the_loss_that_it_had(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replayed with the same weights: the same loss to the bit, for sampled and for written completions."""
    extra = {"keywords": {"lm_dataset": Dataset.from_list(tiny.CHAT_ROWS)}} if kind == "minillm" else {"lmbda": 0.0}
    trainer = make(kind, tmp_path, **extra)
    losses: list[float] = []
    real = trainer.batch_loss

    def batch_loss(model: Any, batch: Any) -> Any:
        loss = real(model, batch)
        losses.append(float(loss.detach()))
        return loss * float("inf") if len(losses) == 2 else loss

    monkeypatch.setattr(trainer, "batch_loss", batch_loss)
    with pytest.raises(NonFiniteError):
        trainer.train()
    monkeypatch.setattr(trainer, "batch_loss", real)
    folder = tmp_path / "nonfinite" / "step-0-rank-0"
    (result,) = replay(trainer, folder)
    assert result["loss"] == losses[1] and result["grad_norm"] > 0 and result["nonfinite"] == []
    assert load_batches(folder, trainer)[0].on_policy == (kind == "minillm")
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[:] = float("nan")
    (result,) = replay(trainer, folder)
    assert result["loss"] != result["loss"] and result["nonfinite"]


def test_batches_of_skipped_steps_are_bounded_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diglot.watching.finite.SAVED_WINDOWS", 2)
    trainer = make("gkd", tmp_path, on_nonfinite="skip", max_steps=4)
    with torch.no_grad():
        trainer.comparisons[0].teacher.model.lm_head.weight.fill_(float("nan"))
    before = tiny.parameters(trainer.model)
    trainer.train()
    assert trainer.finite.skipped == 4 and len(list((tmp_path / "nonfinite").iterdir())) == 2
    assert all(torch.equal(before[n], p) for n, p in trainer.model.named_parameters())


def test_a_saved_batch_keeps_what_the_teacher_alone_read(tmp_path: Path) -> None:
    """`teacher_prompt` comes back as a conversation, from a batch that is replayed as from a checkpoint's."""
    rows = [{**row, "teacher_prompt": [{"role": "user", "content": "More is known here."}]} for row in tiny.CHAT_ROWS]
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), rows, lmbda=0.0)
    (inputs,), _ = trainer.get_batch_samples(iter([trainer.data_collator(rows[:2])]), 1, trainer.args.device)
    save_batches(tmp_path / "kept", [inputs["batch"]], {})
    (again,) = load_batches(tmp_path / "kept", trainer)
    views = [pair.conversation.teacher_view for pair in again.pairs]
    assert all(views) and views == [pair.conversation.teacher_view for pair in inputs["batch"].pairs]
