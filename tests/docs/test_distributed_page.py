"""The tables of docs/distributed.md are those of their formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sizing

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "distributed.md").read_text(encoding="utf-8")


def test_the_sizing_tables_are_those_of_the_formulas() -> None:
    """Whoever changes a formula prints the tables again: `python benchmarks/sizing.py`."""
    assert sizing.memory_table() in PAGE
    assert sizing.wire_table() in PAGE


def test_a_formula_by_hand() -> None:
    """8B over 16 GPUs: 16 bytes a parameter, sharded; two gathered layers, the head twice; kept states; a block."""
    plan = sizing.PLANS[1]
    head = 4096 * 128_256
    by_hand = 8e9 + 4 * (8e9 - 2 * head) / 32 + 4 * head + 2 * 16_384 * 4096 * 32 + 2**30
    assert sizing.student_bytes(plan) == pytest.approx(by_hand)
    assert sizing.wire_bytes(plan.teacher)["hidden"] == 16_384


def test_what_one_gpu_writes_is_bound_by_keys_and_values_and_by_the_host() -> None:
    """1B, 256 at a time behind 768 tokens: 2.4 GB of weights, 6.4 GB of keys and values, 1.5 ms of the host."""
    read = 2 * 1.2e9 + 256 * 768 * (2 * 2 * 16 * 8 * 64)
    assert sizing.rollout_rate(sizing.PLANS[0]) == pytest.approx(256 / (read / (0.4 * 3.35e12) + 1.5e-3))


def test_any_pair_is_sized_by_its_configurations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parameters are those of the model that the configuration makes; of experts the ones that are chosen count."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig

    sizes: dict[str, Any] = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, vocab_size=500)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2)
    dense = LlamaConfig(**sizes, tie_word_embeddings=True)
    dense.save_pretrained(tmp_path / "dense")
    MixtralConfig(**sizes, num_local_experts=8, num_experts_per_tok=2).save_pretrained(tmp_path / "mixed")
    student, teacher = (sizing.load_model(str(tmp_path / name)) for name in ("dense", "mixed"))
    parameters = sum(p.numel() for p in LlamaForCausalLM(dense).parameters())
    assert student.parameters == student.active == parameters and student.kv_bytes == 2 * 2 * 3 * 2 * 16
    assert student.layer * 3 == parameters - 64 * 500
    assert teacher.parameters - teacher.active == 3 * 6 * (3 * 64 * 96)  # six of eight experts, in each layer
    sizing.main(["--student", str(tmp_path / "dense"), "--teacher", str(tmp_path / "mixed"), "--teacher_gpus", "2"])
    assert capsys.readouterr().out.count("dense ← mixed") == 5
