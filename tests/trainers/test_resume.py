"""Stopping at a checkpoint and resuming equals running through, bit for bit, on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import tokenizers_zoo as zoo
import torch


def run(make: Any, out: Path, teacher: str, resume: Any = None, **options: Any) -> Any:
    trainer = make(
        out,
        zoo.chatml(),
        zoo.ALL[teacher](),
        save_strategy="steps",
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        lr_scheduler_type="linear",
        **options,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("make", [tiny.gkd, tiny.minillm], ids=["gkd", "minillm"])
@pytest.mark.parametrize("teacher", ["chatml", "inst"])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resume_is_exact(tmp_path: Path, make: Any, teacher: str, stop: int) -> None:
    """Parameters, optimizer, every logged number after the checkpoint; for MiniLLM in the middle of inner epochs
    too."""
    options: dict[str, Any] = dict(max_steps=5, save_steps=stop)
    options |= {"lmbda": 0.5} if make is tiny.gkd else {"num_iterations": 2, "teacher_mixed_alpha": 0.3}
    through = run(make, tmp_path / "a", teacher, **options)
    resumed = run(make, tmp_path / "b", teacher, resume=str(tmp_path / "a" / f"checkpoint-{stop}"), **options)
    for (name, p), q in zip(through.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    states = [t.optimizer.state_dict()["state"] for t in (through, resumed)]
    assert all(torch.equal(states[0][i]["exp_avg_sq"], states[1][i]["exp_avg_sq"]) for i in states[0])
    timeless = [
        [
            {k: v for k, v in entry.items() if not k.startswith("train_")}
            for entry in t.state.log_history
            if "loss" in entry
        ]
        for t in (through, resumed)
    ]
    assert timeless[0] == timeless[1]


def test_the_check_can_fail(tmp_path: Path) -> None:
    """Resuming with another seed does not give the same parameters: the equality above is not for free."""
    through = run(tiny.gkd, tmp_path / "a", "inst", max_steps=3, save_steps=1, lmbda=1.0)
    other = run(
        tiny.gkd,
        tmp_path / "b",
        "inst",
        resume=str(tmp_path / "a" / "checkpoint-1"),
        max_steps=3,
        save_steps=1,
        lmbda=1.0,
        seed=7,
    )
    assert any(not torch.equal(p, q) for p, q in zip(through.model.parameters(), other.model.parameters(), strict=True))
