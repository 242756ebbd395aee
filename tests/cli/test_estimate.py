"""What `diglot estimate` says is what models take, and what a run says of itself at its start."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
import torch
from support import tiny
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from diglot.cli import blocks
from diglot.cli.estimate import plan_of
from diglot.cli.main import main
from diglot.heads import default_chunk_rows
from diglot.memory import GIB, LOGITS_BUDGET, Plan, Shape, optimizer_bytes

SIZES: dict[str, Any] = dict(
    vocab_size=500, hidden_size=128, intermediate_size=320, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True,
)  # fmt: skip
FAMILIES = {"llama": LlamaConfig, "qwen3": Qwen3Config, "gemma3": Gemma3TextConfig}


def saved_bytes(model: Any, texts: int, length: int, *, half: bool) -> int:
    """What a forward pass keeps for the backward pass, parameters not counted."""
    storages = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(0, 500, (texts, length))
    cast = torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), cast:
        hidden = model.model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    size = sum(nbytes for pointer, nbytes in storages.items() if pointer not in own)
    del hidden
    return size


@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_backward_pass_needs_is_never_more_than_estimated_and_not_much_less(family: str, half: bool) -> None:
    model = AutoModelForCausalLM.from_config(FAMILIES[family](**SIZES))
    measured = saved_bytes(model, 2, 128, half=half)
    shape = Shape.of_config(model.config.to_dict())
    assert shape.parameters == pytest.approx(model.num_parameters(), rel=0.01)
    compute = 2.0 if half else 4.0
    plan = Plan(shape, 4 * shape.parameters, shape.parameters, texts=2, length=128, completion=32, compute=compute)
    estimated = plan.activations + plan.parts.get("16-bit copies", 0)
    assert measured <= 1.01 * estimated and estimated <= 1.3 * measured


def test_all_experts_are_counted_and_those_of_a_token_are_kept() -> None:
    config = Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
    model = AutoModelForCausalLM.from_config(config)
    shape = Shape.of_config(config.to_dict())
    assert shape.parameters == pytest.approx(model.num_parameters(), rel=0.02) and shape.inner == 128


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("models")
    for name, tokenizer, half in (("student", zoo.chatml(), False), ("teacher", zoo.inst(), True)):
        model = tiny.tiny_model(tokenizer)
        (model.to(torch.bfloat16) if half else model).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return str(root / "student"), str(root / "teacher")


@pytest.mark.parametrize(
    "options",
    [{}, {"bf16": True, "activation_checkpointing": True}, {"optim": "adafactor", "num_generations": 3}],
    ids=["default", "bf16", "adafactor"],
)
def test_the_estimate_is_what_the_start_of_the_run_says(
    folders: tuple[str, str], options: dict[str, Any], tmp_path: Path
) -> None:
    arguments = {**dict(per_device_train_batch_size=4, max_completion_length=8, max_length=256), **options}
    before = plan_of({**arguments, "model_name_or_path": folders[0], "teacher_model_name_or_path": folders[1]})
    models = tuple(AutoModelForCausalLM.from_pretrained(f, dtype=d) for f, d in zip(folders, ("float32", "auto"),
                                                                                    strict=True))  # fmt: skip
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), models=models, **arguments)
    at_start = blocks.plan_of(trainer)
    assert at_start is not None and at_start.parts == pytest.approx(before.parts)
    assert before.parts["teacher's weights"] == 2 * models[1].num_parameters()
    line = dict(blocks.start_lines(trainer, blocks.TrainArguments()))["memory"]
    assert line.startswith(f"up to {before.total / GIB:.2f} GiB")


def test_weights_gradients_and_moments_by_hand() -> None:
    plan = Plan(Shape.of_size(1e9), 4e9, 1e9, teachers=((Shape.of_size(8e9), 16e9),))
    parts = plan.parts
    assert (parts["student's weights"], parts["gradients"], parts["optimizer"]) == (4e9, 4e9, 8e9)
    assert parts["teacher's weights"] == 16e9 and plan.total == sum(parts.values())
    assert optimizer_bytes("adamw_bnb_8bit") == 2 and optimizer_bytes("adafactor") == 0 and optimizer_bytes("new") == 8


def test_an_adapter_has_gradients_and_its_base_has_none(folders: tuple[str, str]) -> None:
    from peft import LoraConfig, get_peft_model

    options = {"model_name_or_path": folders[0], "teacher_model_name_or_path": "self", "use_peft": True, "lora_r": 4}
    for modules, names in (("q_proj,v_proj", ["q_proj", "v_proj"]), ("all-linear", "all-linear")):
        model = tiny.tiny_model(zoo.chatml())
        made = get_peft_model(model, LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM"))
        trained = sum(p.numel() for p in made.parameters() if p.requires_grad)
        plan = plan_of({**options, "lora_target_modules": modules})
        assert (plan.trained, plan.teachers) == (trained, ())


def test_a_block_of_logits_stays_within_the_budget_that_is_counted() -> None:
    for sizes in ((49_152, 262_144), (128_256, 151_936), (500, 500)):
        rows = default_chunk_rows(*sizes, "cpu")
        assert rows == 32 or rows * 4 * (2 * sizes[0] + 1.625 * sizes[1]) <= LOGITS_BUDGET


def test_a_teacher_that_is_not_here_takes_nothing_and_one_in_4_bits_a_fraction(folders: tuple[str, str]) -> None:
    student = {"model_name_or_path": folders[0]}
    assert plan_of({**student, "teacher_model_name_or_path": "http://127.0.0.1:1"}).teachers == ()
    several = plan_of(
        {**student, "teacher_model_name_or_path": [folders[1], {"name": "8B", "init_kwargs": {"dtype": "float32"}}]}
    ).teachers
    assert [(round(shape.parameters, -9), round(size, -9)) for shape, size in several] == [(0, 0), (8e9, 32e9)]
    kwargs = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (quantised,) = plan_of(
        {**student, "teacher_model_name_or_path": "8B", "teacher_model_init_kwargs": kwargs}
    ).teachers
    assert 4e9 < quantised[1] < 6e9


def test_what_would_lower_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "1.2B", "8B", "--max_length", "2048"]) == 0
    shown = capsys.readouterr().out
    together = float(next(line for line in shown.splitlines() if "together" in line).split("│")[2])
    lower = [float(line.split()[0]) for line in shown.split("each alone:\n")[1].splitlines()]
    assert len(lower) >= 5 and lower == sorted(lower) and lower[-1] < 0.951 * together
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["8B"], "a student and a teacher"),
        (["8B", "./nope"], "The teacher is './nope' (teacher_model_name_or_path)"),
        (["--model_name_or_path", "8B"], "The teacher is not given"),
        (["1B", "8B", "--lora_rank", "3"], "did you mean 'lora_r"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_does_not_say_its_size_asks_for_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "odd"}), encoding="utf-8")
    assert main(["estimate", str(tmp_path), "8B"]) == 2
    assert "Give its size" in capsys.readouterr().err


def test_it_needs_no_torch(folders: tuple[str, str]) -> None:
    code = "import sys; from diglot.cli.main import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, "estimate", *folders], capture_output=True, text=True)
    assert done.returncode == 0 and "together" in done.stdout, done.stderr
