"""Devices on which a run could not work are refused before anything is loaded or written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
import torch
from support import tiny

from diglot.errors import ConfigError
from diglot.options import DistillationConfig


def refused(tmp_path: Path, message: str, **options: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny.gkd(tmp_path / "run", zoo.chatml(), zoo.inst(), **options)
    assert not (tmp_path / "run").exists()


def test_several_gpus_in_one_process_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nn.DataParallel would cut a batch whose rows are counted through."""
    monkeypatch.setattr(DistillationConfig, "n_gpu", property(lambda self: 4))
    refused(tmp_path, r"4 GPUs are visible .*--nproc_per_node 4.*CUDA_VISIBLE_DEVICES=0")


def test_gpus_that_a_script_adds_before_training_are_refused_too(tmp_path: Path) -> None:
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst())
    trainer.args._n_gpu = 2
    with pytest.raises(ConfigError, match="2 GPUs are visible"):
        trainer.train()


def test_half_precision_that_the_cpu_would_not_compute_in_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "fp16=True does nothing on the CPU.*bf16", fp16=True)


def test_a_device_without_float64_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DistillationConfig, "device", property(lambda self: torch.device("mps")))
    refused(tmp_path, "mps, which has no float64.*use_cpu: true")
