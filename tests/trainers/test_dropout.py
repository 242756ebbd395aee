"""Dropout that is off is off everywhere: in layers, in what attention hands to functions, in adapters, in routers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
import torch
from peft import LoraConfig
from support import tiny
from support.log_ratios import watched_log_ratios
from transformers import AutoModelForCausalLM, DbrxConfig, MiniMaxConfig, MiniMaxM2Config, MixtralConfig, PhimoeConfig

from diglot.heads import dropouts, turn_off_dropout

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


ROUTERS: dict[str, Any] = {
    "mixtral": (MixtralConfig, {"router_jitter_noise": 0.3}),
    "minimax": (MiniMaxConfig, {"router_jitter_noise": 0.3}),
    "minimax_m2": (MiniMaxM2Config, {"router_jitter_noise": 0.3}),
    "dbrx": (DbrxConfig, {"ffn_config": {"moe_jitter_eps": 0.3, "ffn_hidden_size": 48, "hidden_size": 32}}),
    "phimoe, its input": (PhimoeConfig, {"router_jitter_noise": 0.0, "input_jitter_noise": 0.3}),
    "phimoe, its draws": (PhimoeConfig, {"router_jitter_noise": 0.4, "input_jitter_noise": 0.0}),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_without_jitter_compute_in_training_what_they_do_in_evaluation(name: str) -> None:
    kind, jitter = ROUTERS[name]
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    sizes |= dict(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.3)
    if kind is DbrxConfig:
        sizes = dict(
            d_model=32, n_heads=4, n_layers=2, attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}
        )
    torch.manual_seed(0)
    student = AutoModelForCausalLM.from_config(kind(vocab_size=64, max_position_embeddings=64, **sizes, **jitter))
    assert two_passes_differ(student) and any(dropouts(student))
    with torch.no_grad():
        evaluated = student.eval()(input_ids=TOKEN_IDS).logits
        turn_off_dropout(student)
        assert not any(dropouts(student))
        torch.testing.assert_close(student.train()(input_ids=TOKEN_IDS).logits, evaluated, rtol=0, atol=0)


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
