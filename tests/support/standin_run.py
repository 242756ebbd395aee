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
from peft import LoraConfig  # noqa: E402
from support import tiny  # noqa: E402
from support import tokenizers_zoo as zoo  # noqa: E402

from diglot.data import to_sample  # noqa: E402
from diglot.objectives import OBJECTIVES  # noqa: E402
from diglot.rendering import Renderer  # noqa: E402
from diglot.rollouts import TransformersSampler  # noqa: E402
from diglot.teachers import LocalTeacher  # noqa: E402
from diglot.teachers.scoring import Manner, Reading, score_texts  # noqa: E402
from diglot.trainers.base import DistillationTrainer  # noqa: E402

STEPS = 2
PHASES = ("window", "loss", "backward", "rest", "generation")


def _watch(owner: Any, name: str, phase: str) -> None:
    plain = getattr(owner, name)

    @functools.wraps(plain)
    def run(*arguments: Any, **keywords: Any) -> Any:
        with standin.waits.during(phase):
            return plain(*arguments, **keywords)

    setattr(owner, name, run)


ONE, TWO = f"{standin.NAME}:0", f"{standin.NAME}:1"
PLACES = {"model.embed_tokens": ONE, "model.rotary_emb": ONE, "model.layers.0": ONE, "model.layers.1": TWO}
PLACES |= {"model.norm": TWO, "lm_head": ONE}
"""Of a teacher on two devices, whose head is on the first one."""
HERE = {"use_cpu": False, "dataloader_pin_memory": False, "min_coverage": 0.0}


def trainer_of(
    make: Any, out: Path, *, same: bool = False, place: str | None = None, split: bool = False, tied: bool = False,
    **options: Any,
) -> Any:  # fmt: skip
    """A trainer of tiny models; `place` is where the teacher is put beforehand, `split` spreads it."""
    student, teacher = zoo.chatml(), zoo.chatml() if same else zoo.inst()
    # The fused attention of the CPU rounds otherwise than the plain one.
    config = {"attn_implementation": "eager", "tie_word_embeddings": tied}
    models = [tiny.tiny_model(t, seed, **config) for seed, t in enumerate((student, teacher))]
    if place:
        models[1].to(place)  # type: ignore[arg-type]
        models[1].hf_device_map = {"": place}
    if split:
        models[1] = dispatch_model(models[1], PLACES, main_device=ONE, force_hooks=True)
        models[1].hf_device_map = PLACES
    return make(out, student, teacher, models=tuple(models), **{**HERE, "max_steps": STEPS, **options})


def losses(trainer: Any) -> list[float]:
    """Of each step that a trained trainer has logged."""
    assert {p.device.type for p in trainer.student.parameters()} == {standin.NAME}
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train(make: Any, out: Path, **options: Any) -> list[float]:
    """Losses of a few steps."""
    trainer = trainer_of(make, out, **options)
    trainer.train()
    return losses(trainer)


def resume(make: Any, out: Path, **options: Any) -> list[float]:
    """Losses of a run of a few steps, then of its continuation from the first one."""
    options |= {"save_strategy": "steps", "save_steps": 1}
    whole = trainer_of(make, out, **options)
    whole.train()
    again = trainer_of(make, out, **options)
    again.train(resume_from_checkpoint=str(out / "checkpoint-1"))
    for one, other in zip(whole.student.parameters(), again.student.parameters(), strict=True):
        assert torch.equal(one.cpu(), other.cpu())
    return losses(whole) + losses(again)


def evaluate(out: Path, **options: Any) -> list[float]:
    """Numbers of an evaluation."""
    trainer = trainer_of(tiny.gkd, out, **options)
    report = trainer.evaluate(Dataset.from_list(tiny.CHAT_ROWS[:4]))
    return [report["eval_loss"], report["eval_bits_per_byte"]]


def score(level: str, objective: str, out: Path) -> list[float]:
    """Losses of a student that learns from scores which a teacher on the device has written."""
    model = tiny.tiny_model(zoo.inst(), 1, attn_implementation="eager").to(ONE)  # type: ignore[arg-type]
    eos = model.generation_config.eos_token_id
    renderer = Renderer(zoo.inst(), num_embeddings=len(zoo.inst()), generation_config=model.generation_config)
    samples = [to_sample(row, f"row {i}") for i, row in enumerate(tiny.CHAT_ROWS)]
    folder, manner = out / "scores", Manner(level, k=20, batch_size=3, shard_texts=5)
    teacher = LocalTeacher(model, renderer)
    score_texts(teacher, samples, folder, data="rows", reading=Reading(), manner=manner, generation_eos=eos)
    student = tiny.tiny_model(zoo.chatml(), 0, attn_implementation="eager")
    options = {**HERE, "objective": objective, "lmbda": 0.0}
    trainer = tiny.gkd(out / "run", zoo.chatml(), None, models=(student, str(folder)), **options)  # type: ignore[arg-type]
    trainer.train()
    return losses(trainer)


def several(make: Any, out: Path, **options: Any) -> list[float]:
    """Losses with two teachers, one of them on another device."""
    plain: Any = {"attn_implementation": "eager"}
    teachers = [tiny.tiny_model(t, seed, **plain) for seed, t in ((1, zoo.inst()), (2, zoo.turns()))]
    teachers[1].to(TWO)  # type: ignore[arg-type]
    teachers[1].hf_device_map = {"": TWO}
    named = [{"name": model, "weight": 1.0, "label": f"t{i}"} for i, model in enumerate(teachers)]
    models = tiny.tiny_model(zoo.chatml(), 0, **plain), named
    tokenizers: Any = [zoo.inst(), zoo.turns()]
    trainer = make(out, zoo.chatml(), tokenizers, models=models, **{**HERE, **options})
    trainer.train()
    return losses(trainer)


def cases() -> dict[str, Any]:
    """By name, what to do with a folder."""
    gkd, minillm = functools.partial(train, tiny.gkd), functools.partial(train, tiny.minillm)
    results: dict[str, Any] = {}
    for name in OBJECTIVES:
        options = {"objective": name, "same": name == "jsd"}
        results[f"gkd-{name}"] = functools.partial(gkd, lmbda=1.0, **options)
        results[f"minillm-{name}"] = functools.partial(minillm, num_iterations=1, max_steps=1, **options)
    lora = {"peft_config": LoraConfig(r=4, lora_alpha=32, task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])}
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    return results | {
        "gkd-data": functools.partial(gkd, objective="strict", lmbda=0.0),
        "gkd-generations": functools.partial(gkd, lmbda=1.0, num_generations=3),
        "gkd-nucleus": functools.partial(gkd, lmbda=1.0, top_p=0.9),
        "gkd-observed": functools.partial(gkd, lmbda=1.0, log_rollouts=2),
        "gkd-tied": functools.partial(gkd, lmbda=1.0, tied=True),
        "gkd-lora": functools.partial(gkd, lmbda=1.0, keywords=lora),
        "gkd-compiled": functools.partial(gkd, lmbda=0.0, objective="strict", **compiled),
        "gkd-accumulated": functools.partial(gkd, lmbda=0.0, gradient_accumulation_steps=2),
        "gkd-beside": functools.partial(gkd, objective="dskd", place="cpu", lmbda=1.0),
        "gkd-beside-bpm": functools.partial(gkd, objective="bpm", place=TWO, lmbda=1.0),
        "gkd-beside-covering": functools.partial(gkd, place=TWO, lmbda=1.0),
        "gkd-split": functools.partial(gkd, objective="strict", split=True, lmbda=1.0),
        "gkd-split-covering": functools.partial(gkd, split=True, lmbda=1.0),
        "gkd-split-tied": functools.partial(gkd, split=True, tied=True, lmbda=1.0),
        "gkd-several": functools.partial(several, tiny.gkd, objective="strict", lmbda=1.0),
        "minillm": functools.partial(minillm, num_iterations=2),
        "minillm-beside": functools.partial(minillm, place=TWO, num_iterations=2),
        "minillm-split": functools.partial(minillm, split=True, num_iterations=2),
        "minillm-same": functools.partial(minillm, same=True),
        "minillm-tied": functools.partial(minillm, tied=True),
        "minillm-several": functools.partial(several, tiny.minillm),
        "evaluate": evaluate,
        "evaluate-beside": functools.partial(evaluate, place=TWO),
        "evaluate-split": functools.partial(evaluate, split=True),
        "resume-gkd": functools.partial(resume, tiny.gkd, lmbda=1.0),
        "resume-minillm": functools.partial(resume, tiny.minillm, num_iterations=2),
        "resume-tied": functools.partial(resume, tiny.gkd, lmbda=0.0, tied=True),
        "score-logprobs": functools.partial(score, "logprobs", "span"),
        "score-top_k": functools.partial(score, "top_k", "top_k"),
        "score-bytes": functools.partial(score, "bytes", "byte"),
    }


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # as `full_determinism` does: every case fails where CUDA would raise
    torch.utils.deterministic.fill_uninitialized_memory = False
    _watch(DistillationTrainer, "train", "rest")  # the optimizer, and the log
    _watch(DistillationTrainer, "training_step", "backward")
    _watch(DistillationTrainer, "get_batch_samples", "window")
    _watch(DistillationTrainer, "compute_loss", "loss")
    _watch(TransformersSampler, "__call__", "generation")
    chosen = sys.argv[1:]
    with tempfile.TemporaryDirectory() as root:
        for name, run in cases().items():
            if chosen and name not in chosen:
                continue
            line: dict[str, Any] = {"case": name}
            standin.waits.counts.clear()
            try:
                line["values"] = run(Path(root) / name)
                line["waits"] = {p: standin.waits.total(p) / len(line["values"]) for p in PHASES}
                line["tables"] = {p: standin.waits.table(p) for p in line["waits"]}
            except Exception:
                line["error"] = traceback.format_exc()
            print("CASE", json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
