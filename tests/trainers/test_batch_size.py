"""A micro-batch that became smaller because memory ran out still serves every row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
from support import tiny

ROWS = [{"prompt": [{"role": "user", "content": f"Say {i}."}]} for i in range(16)]


@pytest.mark.parametrize(("make", "options"), [(tiny.gkd, {"lmbda": 1.0}), (tiny.minillm, {"num_iterations": 3})])
def test_every_row_is_answered_once_an_epoch(make: Any, options: dict[str, Any], tmp_path: Path) -> None:
    """Inner epochs use whole windows of the smaller size; seeds of rows differ inside each window."""
    options |= {"auto_find_batch_size": True, "per_device_train_batch_size": 8, "max_steps": -1, "num_train_epochs": 1}
    trainer = make(tmp_path, zoo.chatml(), zoo.inst(), ROWS, **options)
    answered: list[list[str]] = []
    failed: list[bool] = []
    write, loss, complete = trainer.student_writes, trainer.compute_loss, trainer.complete

    def writes(window: Any) -> Any:
        answered.append([s.conversation.messages[0]["content"] for batch in window for s in batch])
        return write(window)

    def completes(conversations: Any, prompts: Any, seeds: Any) -> Any:
        assert len(set(seeds)) == len(seeds)
        return complete(conversations, prompts, seeds)

    def out_of_memory_once(*arguments: Any, **keywords: Any) -> Any:
        if not failed:
            failed.append(True)
            answered.clear()
            raise RuntimeError("CUDA out of memory.")
        return loss(*arguments, **keywords)

    trainer.student_writes, trainer.complete, trainer.compute_loss = writes, completes, out_of_memory_once
    trainer.train()
    assert len(answered[0]) < 8
    assert {text for window in answered for text in window} == {row["prompt"][0]["content"] for row in ROWS}
    assert len({len(window) for window in answered[:-1]}) == 1
    rows = sum(len(window) for window in answered)
    assert rows < len(ROWS) + len(answered[0])  # a last window is filled up, no other row comes twice
