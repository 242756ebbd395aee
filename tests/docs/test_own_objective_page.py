"""docs/own-objective.md: its example trains, and what is no objective is refused at the start."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import support.tokenizers_zoo as zoo
import torch
from support import tiny

from diglot.errors import ConfigError
from diglot.objectives import make_objective, objective_class
from diglot.objectives.chunks import chunk_sums

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "own-objective.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
PLACE = "my_package.my_file:ChunkGap"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_package").mkdir()
    more = "\nclass Half(Objective):\n    name = 'half'\n\n    def plan(self, written):\n        return None\n"
    (tmp_path / "my_package" / "my_file.py").write_text(EXAMPLE + more, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("my_package")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.usefixtures("example")
@pytest.mark.parametrize("make", [tiny.gkd, tiny.minillm])
def test_the_example_trains_beside_another_objective(tmp_path: Path, make: object) -> None:
    assert len(EXAMPLE.splitlines()) < 40 and f'"{PLACE}"' in PAGE
    objective = [{"name": "strict"}, {"name": PLACE, "weight": 0.1, "scale": 0.5}]
    trainer = make(tmp_path / "run", zoo.chatml(), zoo.inst(), tiny.CHAT_ROWS, objective=objective)  # type: ignore
    before = tiny.parameters(trainer.model)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(math.isfinite(entry["chunk_gap/loss"]) and entry["chunk_gap/loss"] > 0 for entry in logged)
    assert any(not torch.equal(before[n], p) for n, p in trainer.model.named_parameters())


@pytest.mark.usefixtures("example")
def test_its_value_is_the_mean_square_of_the_gaps(tmp_path: Path) -> None:
    trainer = tiny.gkd(tmp_path / "run", zoo.chatml(), zoo.inst(), lmbda=0.0, objective=PLACE)
    batch = trainer.data_collator(tiny.CHAT_ROWS[:4])
    (inputs,), _ = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    read, teacher = inputs["batch"].views[0].read, trainer.comparisons[0].teacher
    sums = []
    with torch.no_grad():
        for model, side, chunk in (
            (trainer.model, read.student, read.alignment.chunk_s),
            (teacher.model, read.teacher, read.alignment.chunk_t),  # type: ignore[union-attr]
        ):
            logits = model(side.input_ids, attention_mask=side.attention_mask).logits.flatten(0, 1)[side.rows]
            stops = (trainer.student_renderer if model is trainer.model else teacher.renderer).stop_ids
            logp = logits.log_softmax(-1)
            written = logp.gather(1, side.targets[:, None])[:, 0]
            logps = torch.where(side.stop, logp[:, list(stops)].logsumexp(-1), written)
            sums.append(chunk_sums(logps, chunk, read.alignment.num_chunks)[read.alignment.chunk_exact])
    expected = float((sums[0] - sums[1]).square().mean())
    assert float(trainer.compute_loss(trainer.model, inputs).detach()) == pytest.approx(expected, rel=1e-4)
    assert np.isfinite(expected) and expected > 0


@pytest.mark.usefixtures("example")
@pytest.mark.parametrize(("place", "message"), [
    ("my_package.my_file:Chunks", "must be a class that extends diglot.Objective"),
    ("my_package.my_file:Half", "lacks loss"), ("my_package.my_file:Nothing", "has no attribute 'Nothing'"),
    ("no_package_of_anybody:Mine", "No module named 'no_package_of_anybody'"),
])  # fmt: skip
def test_what_is_no_objective_is_refused_with_the_reason(place: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        objective_class(place)


@pytest.mark.usefixtures("example")
def test_options_that_it_does_not_take_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no option 'size'.*It knows scale"):
        make_objective(PLACE, None, size=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"kd_temperature=2\.0 has no part in objective 'chunk_gap'"):
        tiny.gkd(tmp_path / "run", zoo.chatml(), zoo.inst(), objective=PLACE, kd_temperature=2.0)
