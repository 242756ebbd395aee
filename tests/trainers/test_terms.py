"""Every objective in both trainers: it trains, is counted and logged, and its loss does not depend on the split."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import tokenizers_zoo as zoo

from diglot.objectives import OBJECTIVES

CROSS = sorted(set(OBJECTIVES) - {"jsd"})
OPTIONS: dict[str, dict[str, Any]] = {}


@pytest.mark.parametrize("name", CROSS)
@pytest.mark.parametrize("make", [tiny.gkd, tiny.minillm])
def test_every_objective_trains_in_both_trainers(tmp_path: Path, make: Any, name: str) -> None:
    options = {"lmbda": 0.5} if make is tiny.gkd else {"num_iterations": 2}
    trainer = make(
        tmp_path,
        zoo.chatml(),
        zoo.turns(),
        tiny.CHAT_ROWS,
        objective=[{"name": name, **OPTIONS.get(name, {})}],
        **options,
    )
    before = tiny.parameters(trainer.model)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2 and all(math.isfinite(entry["loss"]) for entry in logged)
    assert any(f"{name}/loss" in entry for entry in logged)
    after = tiny.parameters(trainer.model)
    assert any(not (before[key] == after[key]).all() for key in before)
