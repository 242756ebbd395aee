"""Dropout that is off is off everywhere: in layers, in what attention hands to functions, and in adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
import torch
from peft import LoraConfig
from support import tiny
from support.log_ratios import watched_log_ratios

from diglot.heads import dropouts

TOKEN_IDS = torch.arange(3, 23)[None]


def student_of(kind: str) -> tuple[Any, dict[str, Any]]:
    """A student that drops out somewhere, and the trainer's keywords that go with it."""
    if kind == "attention":
        return tiny.tiny_model(zoo.chatml(), 0, attention_dropout=0.3), {}
    student = tiny.tiny_model(zoo.chatml(), 0)
    if kind == "layer":
        student.model.layers[0].mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(0.3))
        return student, {}
    adapter = LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear", init_lora_weights=False)
    return student, {"peft_config": adapter}


def two_passes_differ(model: Any) -> bool:
    model.train()
    with torch.no_grad():
        first, second = (model(input_ids=TOKEN_IDS).logits for _ in range(2))
    return not torch.equal(first, second)


@pytest.mark.parametrize("make", [tiny.gkd, tiny.minillm])
@pytest.mark.parametrize("kind", ["layer", "attention", "adapter"])
def test_passes_of_training_are_equal_unless_dropout_is_kept(
    make: Any, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for off in (True, False):
        student, keywords = student_of(kind)
        models = student, tiny.tiny_model(zoo.inst(), 1)
        caplog.clear()
        trainer = make(tmp_path, zoo.chatml(), zoo.inst(), models=models, keywords=keywords, disable_dropout=off)
        assert two_passes_differ(trainer.model) is not off
        assert any(dropouts(trainer.model)) is not off
        assert ("lora_dropout=0.3 is off" in caplog.text) is (off and kind == "adapter")
        assert ("ratios of the policy are noise" in caplog.text) is (not off and make is tiny.minillm)
    if kind == "attention":  # what is saved says what the model was made with
        assert student.config.attention_dropout == 0.3


@pytest.mark.parametrize("kind", ["attention", "adapter"])
def test_nothing_is_clipped_before_the_first_step(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probs of the same weights, once when written and once when trained."""
    seen = watched_log_ratios(monkeypatch)
    student, keywords = student_of(kind)
    options = {"max_steps": 2, "num_iterations": 2, "learning_rate": 1e-2, "teacher_mixed_alpha": 0.0}
    models = student, tiny.tiny_model(zoo.inst(), 1)
    tiny.minillm(tmp_path, zoo.chatml(), zoo.inst(), models=models, keywords=keywords, **options).train()
    first, second = seen
    assert first < 1e-6 < second
