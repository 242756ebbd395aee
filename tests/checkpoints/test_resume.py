"""Stopping at a checkpoint and resuming equals running through, bit for bit, on one process."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support.tokenizers_zoo as zoo
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file, save_file
from support import tiny


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


def everything(trainer: Any) -> dict[str, torch.Tensor]:
    """Parameters, projectors, the optimizer's state, and the random numbers that come next."""
    results = {f"model.{n}": p.detach() for n, p in trainer.model.named_parameters()}
    results |= {f"projector.{n}": p.detach() for n, p in trainer.projectors.items()}
    for i, moments in trainer.optimizer.state_dict()["state"].items():
        results |= {f"optimizer.{i}.{n}": torch.as_tensor(value) for n, value in moments.items()}
    results["python"] = torch.tensor(random.getstate()[1])
    results["numpy"] = torch.from_numpy(np.asarray(np.random.get_state()[1]).astype(np.int64))
    return {**results, "torch": torch.get_rng_state()}


def same_run(make: Any, out: Path, teacher: str, stop: int, **options: Any) -> tuple[Any, Any]:
    """Running through, and from a checkpoint, are equal in all that goes on and in all that was logged."""
    through = run(make, out / "a", teacher, **options)
    expected = {n: x.clone() for n, x in everything(through).items()}
    resumed = run(make, out / "b", teacher, resume=str(out / "a" / f"checkpoint-{stop}"), **options)
    result = everything(resumed)
    assert expected.keys() == result.keys()
    for name, value in expected.items():
        assert torch.equal(value, result[name]), name
    timeless = [
        [
            {k: v for k, v in entry.items() if not k.startswith(("train_", "teacher/cache_"))}
            for entry in t.state.log_history
            if "loss" in entry
        ]
        for t in (through, resumed)
    ]
    assert timeless[0] == timeless[1]
    return through, resumed


@pytest.mark.parametrize("make", [tiny.gkd, tiny.minillm], ids=["gkd", "minillm"])
@pytest.mark.parametrize("teacher", ["chatml", "inst"])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resume_is_exact(tmp_path: Path, make: Any, teacher: str, stop: int) -> None:
    """Parameters, optimizer, random numbers, every logged number after the checkpoint; for MiniLLM in the middle of
    inner epochs too."""
    options: dict[str, Any] = dict(max_steps=5, save_steps=stop)
    options |= {"lmbda": 0.5} if make is tiny.gkd else {"num_iterations": 2, "teacher_mixed_alpha": 0.3}
    same_run(make, tmp_path, teacher, stop, **options)


@pytest.mark.parametrize("cache", ["kept", "new"])
def test_resume_is_exact_with_projectors_and_the_teachers_cache(tmp_path: Path, cache: str) -> None:
    """Whether the cache is still there or not: what it holds is what the teacher says."""
    objective = ["strict", {"name": "dskd", "weight": 0.1}]
    options = dict(max_steps=5, save_steps=2, lmbda=0.5, objective=objective)
    first = run(tiny.gkd, tmp_path / "c", "inst", teacher_cache_dir=str(tmp_path / "cache"), **options)
    where = tmp_path / ("cache" if cache == "kept" else "another")
    through, resumed = same_run(tiny.gkd, tmp_path, "inst", 2, teacher_cache_dir=str(where), **options)
    assert through.projectors and resumed.comparisons[0].cache is not None
    for p, q in zip(first.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_resume_is_exact_with_texts_for_language_modelling_and_several_completions(tmp_path: Path) -> None:
    texts = {"lm_dataset": Dataset.from_list(tiny.CHAT_ROWS)}
    options = dict(max_steps=5, save_steps=3, num_iterations=2, num_generations=2, teacher_mixed_alpha=0.0)
    same_run(tiny.minillm, tmp_path, "inst", 3, keywords=texts, **options)


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


@pytest.mark.parametrize(("absent", "named"), [
    ((), []),
    (("model.norm.weight",), ["model.norm.weight"]),
    (("model.embed_tokens.weight",), ["lm_head.weight", "model.embed_tokens.weight"]),
])  # fmt: skip
def test_of_tied_weights_only_those_are_missing_that_a_checkpoint_holds_under_no_name(
    absent: tuple[str, ...], named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tiny.tiny_model(zoo.chatml(), 0, tie_word_embeddings=True), tiny.tiny_model(zoo.inst(), 1)
    trainer = run(tiny.gkd, tmp_path, "inst", models=models, save_steps=1)
    file = tmp_path / "checkpoint-1" / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if name not in absent}, file)
    texts: list[str] = []
    monkeypatch.setattr(transformers.trainer.logger, "warning", texts.append)
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert [sorted(re.findall(r"'(.+?)'", text)) for text in texts] == ([named] if named else [])
