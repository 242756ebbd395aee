"""A step of the optimizer moves the weights, in every recipe; weights that rounding would hold in place are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from support import tiny
from support.log_ratios import watched_log_ratios

from diglot.cli.recipes import load_recipes
from diglot.cli.train import build, split
from diglot.errors import ConfigError
from diglot.rollouts import TransformersSampler
from diglot.teachers import LocalTeacher

RECIPES = load_recipes()
HERE = {  # what of a recipe is about machines, servers or sizes
    "teacher_model_init_kwargs": {"dtype": "bfloat16"}, "use_vllm": False, "fsdp": "", "fsdp_config": None,
    "max_length": 256, "max_completion_length": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
    "max_steps": 3, "warmup_steps": 0, "log_rollouts": 0, "lr_scheduler_type": "constant", "use_cpu": True,
    "disable_tqdm": True, "chat_template_kwargs": None,
    "teacher_chat_template_kwargs": None, "teacher_tokenizer_name_or_path": None,
    "save_strategy": "no", "min_coverage": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student and a teacher whose files hold bfloat16, and rows."""
    root = tmp_path_factory.mktemp("pair")
    for name, tokenizer, seed in (("student", zoo.chatml(), 0), ("teacher", zoo.inst(), 1)):
        tiny.tiny_model(tokenizer, seed).bfloat16().save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.CHAT_ROWS))
    return root


@pytest.mark.parametrize("name", RECIPES)
def test_three_steps_of_every_recipe_move_the_weights(name: str, folders: Path, tmp_path: Path) -> None:
    """At the recipe's own learning rate and number types. With bfloat16 weights it is a few percent."""
    options = yaml.safe_load(RECIPES[name])
    options |= {**HERE, "output_dir": str(tmp_path / "run"), "dataset_name": str(folders / "rows.jsonl")}
    options |= {"model_name_or_path": str(folders / "student"), "teacher_model_name_or_path": str(folders / "teacher")}
    trainer = build(*split(options))
    # Of the layers: rows of the embedding and of the head that no text has get no gradient.
    trained = {n: p for n, p in trainer.student.named_parameters() if p.requires_grad and "layers." in n}
    before = {n: p.detach().clone() for n, p in trained.items()}
    trainer.train()
    moved = sum(int((p.detach() != before[n]).sum()) for n, p in trained.items()) / sum(
        p.numel() for p in trained.values()
    )
    assert moved > 0.9, moved
    assert {p.dtype for p in trained.values()} == {torch.float32}


def test_a_student_by_name_is_float32_and_a_frozen_base_is_what_its_file_holds(folders: Path, tmp_path: Path) -> None:
    place = str(folders / "student"), tiny.tiny_model(zoo.inst(), 1)
    whole = tiny.gkd(tmp_path / "a", zoo.chatml(), zoo.inst(), models=place)
    assert {p.dtype for p in whole.student.parameters()} == {torch.float32}
    lora = {"peft_config": LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear")}
    adapted = tiny.gkd(tmp_path / "b", zoo.chatml(), zoo.inst(), models=place, keywords=lora)
    kinds = {(p.requires_grad, p.dtype) for p in adapted.student.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trainable_weights_of_16_bits_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    models = tiny.tiny_model(zoo.chatml(), 0).to(dtype), tiny.tiny_model(zoo.inst(), 1)
    with pytest.raises(ConfigError, match=rf"kept in 16 bits \(.*: {dtype}\).*float32 .*bf16.*stochastic"):
        tiny.gkd(tmp_path / "run", zoo.chatml(), zoo.inst(), models=models)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("options", "allowed"), [
    ({"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True"}, True),
    ({"optim": "stable_adamw"}, True),
    ({"optim": "adamw_torch_8bit"}, False), ({"optim": "adafactor"}, False),
])  # fmt: skip
def test_an_optimizer_that_makes_up_for_rounding_may_have_16_bits(
    options: dict[str, Any], allowed: bool, tmp_path: Path
) -> None:
    def make() -> Any:
        models = tiny.tiny_model(zoo.chatml(), 0).bfloat16(), tiny.tiny_model(zoo.inst(), 1)
        return tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), models=models, **options)

    if allowed:
        assert {p.dtype for p in make().student.parameters()} == {torch.bfloat16}
    else:
        with pytest.raises(ConfigError, match="16 bits"):
            make()


def test_plain_adamw_of_the_callers_own_is_refused_too(tmp_path: Path) -> None:
    student = tiny.tiny_model(zoo.chatml(), 0).bfloat16()
    own = {"optimizers": (torch.optim.AdamW(student.parameters()), None)}
    with pytest.raises(ConfigError, match="16 bits"):
        tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), models=(student, tiny.tiny_model(zoo.inst(), 1)), keywords=own)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_ratio_of_the_first_inner_step_is_one(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probs are scored as they are trained: clipping starts from what the policy was."""
    seen = watched_log_ratios(monkeypatch)
    options = {"num_iterations": 2, "max_steps": 2, "learning_rate": 1e-2, "bf16": dtype == "bf16"}
    tiny.minillm(tmp_path, zoo.chatml(), zoo.inst(), **options, teacher_mixed_alpha=0.0).train()
    first, second = seen
    assert first < 1e-6 < second


def test_whoever_reads_a_model_reads_it_under_the_autocast_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training, rewards, observed completions and evaluation ask the teacher and let the student write in one type."""
    seen: dict[str, set[bool]] = {}

    def watch(owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def run(*arguments: Any, **keywords: Any) -> Any:
            seen.setdefault(name, set()).add(torch.is_autocast_enabled("cpu"))
            return plain(*arguments, **keywords)

        monkeypatch.setattr(owner, name, run)

    watch(LocalTeacher, "at_rows")
    watch(TransformersSampler, "__call__")
    options = {"bf16": True, "log_rollouts": 2, "max_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    data = {"eval_dataset": Dataset.from_list(tiny.CHAT_ROWS[:3])}
    tiny.minillm(tmp_path / "a", zoo.chatml(), zoo.inst(), **options, keywords=data).train()
    tiny.gkd(tmp_path / "b", zoo.chatml(), zoo.inst(), **options, lmbda=1.0, keywords=data).train()
    assert seen == {"at_rows": {True}, "__call__": {True}}
