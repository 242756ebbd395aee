"""Trains and evaluates tiny models on the stand-in device, in a process of its own; prints a line of JSON per case."""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from support import standin

standin.install()

import torch  # noqa: E402
from accelerate import dispatch_model  # noqa: E402
from datasets import Dataset  # noqa: E402
from support import tiny  # noqa: E402
from support import tokenizers_zoo as zoo  # noqa: E402

from diglot.objectives import OBJECTIVES  # noqa: E402
from diglot.rollouts import TransformersSampler  # noqa: E402
from diglot.trainers.base import DistillationTrainer  # noqa: E402

STEPS = 2


def _watch(owner: Any, name: str, phase: str) -> None:
    plain = getattr(owner, name)

    @functools.wraps(plain)
    def run(*given: Any, **keywords: Any) -> Any:
        with standin.waits.during(phase):
            return plain(*given, **keywords)

    setattr(owner, name, run)


def train(
    make: Any, out: Path, *, same: bool = False, place: str | None = None, split: bool = False, **options: Any
) -> list[float]:
    """Losses of a few steps; `place` is where the teacher is put beforehand, `split` spreads it."""
    student, teacher = zoo.chatml(), zoo.chatml() if same else zoo.inst()
    # The fused attention of the CPU rounds otherwise than the plain one.
    models = [tiny.tiny_model(t, seed, attn_implementation="eager") for seed, t in enumerate((student, teacher))]
    if place:
        models[1].to(place)  # type: ignore[arg-type]
        models[1].hf_device_map = {"": place}
    if split:
        one, two = f"{standin.NAME}:0", f"{standin.NAME}:1"
        places = {"model.embed_tokens": one, "model.rotary_emb": one, "model.layers.0": one, "model.layers.1": two}
        places |= {"model.norm": two, "lm_head": one}
        models[1] = dispatch_model(models[1], places, main_device=one, force_hooks=True)
        models[1].hf_device_map = places
    cpu = {"use_cpu": False, "dataloader_pin_memory": False, "min_coverage": 0.0, "max_steps": STEPS}
    trainer = make(out, student, teacher, models=tuple(models), **{**cpu, **options})
    standin.waits.counts.clear()
    trainer.train()
    assert {p.device.type for p in trainer.student.parameters()} == {standin.NAME}
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def evaluate(out: Path) -> list[float]:
    """Numbers of an evaluation."""
    models = [tiny.tiny_model(t, seed) for seed, t in enumerate((zoo.chatml(), zoo.inst()))]
    trainer = tiny.gkd(out, zoo.chatml(), zoo.inst(), models=tuple(models), use_cpu=False, dataloader_pin_memory=False)
    found = trainer.evaluate(Dataset.from_list(tiny.CHAT_ROWS[:4]))
    return [found["eval_loss"], found["eval_bits_per_byte"]]


def cases() -> dict[str, Any]:
    """By name, what to do with a folder."""
    gkd, minillm = tiny.gkd, tiny.minillm
    found: dict[str, Any] = {
        f"gkd-{name}": functools.partial(train, gkd, objective=name, same=name == "jsd", lmbda=1.0)
        for name in OBJECTIVES
    }
    return found | {
        "gkd-data": functools.partial(train, gkd, objective="strict", lmbda=0.0),
        "gkd-generations": functools.partial(train, gkd, lmbda=1.0, num_generations=3),
        "gkd-observed": functools.partial(train, gkd, lmbda=1.0, log_rollouts=2),
        "gkd-beside": functools.partial(train, gkd, objective="dskd", place="cpu", lmbda=1.0),
        "gkd-beside-bpm": functools.partial(train, gkd, objective="bpm", place=f"{standin.NAME}:1", lmbda=1.0),
        "gkd-split": functools.partial(train, gkd, objective="strict", split=True, lmbda=1.0),
        "minillm": functools.partial(train, minillm, num_iterations=2),
        "minillm-bpm": functools.partial(train, minillm, objective="bpm"),
        "minillm-beside": functools.partial(train, minillm, place=f"{standin.NAME}:1"),
        "minillm-same": functools.partial(train, minillm, same=True),
        "evaluate": evaluate,
    }


def main() -> None:
    torch.set_num_threads(1)
    _watch(DistillationTrainer, "get_batch_samples", "window")
    _watch(DistillationTrainer, "compute_loss", "loss")
    _watch(TransformersSampler, "__call__", "generation")
    chosen = sys.argv[1:]
    with tempfile.TemporaryDirectory() as root:
        for name, run in cases().items():
            if chosen and name not in chosen:
                continue
            line: dict[str, Any] = {"case": name}
            try:
                line["values"] = run(Path(root) / name)
                line["waits"] = {p: standin.waits.total(p) / STEPS for p in ("window", "loss", "generation")}
                line["tables"] = {p: standin.waits.table(p) for p in line["waits"]}
            except Exception:
                line["error"] = traceback.format_exc()
            print("CASE", json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
