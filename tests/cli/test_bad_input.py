"""A wrong value of any option, or in any column: one message, exit code 2, nothing written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import tiny

from diglot.cli.main import main
from diglot.cli.options import load_options
from diglot.ranges import RANGES

OPTIONS = load_options()
HUB = "only the hub knows which names there are"
TEXT = "any text is right"
# Options of which no value can be told to be wrong before it is used, and why.
FREE = {
    "model_revision": HUB, "teacher_model_revision": HUB, "hub_model_id": HUB, "hub_revision": HUB, "hub_token": HUB,
    "dataset_config": HUB, "trackio_bucket_id": HUB, "trackio_space_id": HUB, "trackio_static_space_id": HUB,
    "project": TEXT, "run_name": TEXT, "teacher_system_prompt": TEXT,
    "length_column_name": "a column of the Trainer's own sampler, which is not used",
    "metric_for_best_model": "which metrics there are is known after the first evaluation",
    "reference_model_name_or_path": "read only if an objective asks for it; tests/objectives has those that do",
    "reference_teacher_model_name_or_path": "read only if an objective asks for it",
    "fsdp_config": "read only with fsdp",
    "liger_kernel_config": "read only where Liger is installed", "optim_target_modules": "patterns: any text is right",
    "torch_compile_mode": "torch.compile says which there are",
    "torch_compile_backend": "torch.compile says which there are",
}  # fmt: skip
# What a wrong value looks like, beside those that are wrong for their type; more arguments may be needed to see it.
WRONG: dict[str, list[str]] = {
    "attn_implementation": ["nonsense"], "model_name_or_path": ["/nowhere"], "tokenizer_name_or_path": ["/nowhere"],
    "teacher_model_name_or_path": ["/nowhere"], "teacher_tokenizer_name_or_path": ["/nowhere"],
    "teacher_model_server_url": ["http://user:secret@host"], "teacher_server_concurrency": ["0"],
    "teacher_server_timeout": ["0"], "teacher_server_retry_seconds": ["-1"], "teacher_cache_dir": ["FILE"],
    "dataset_name": ["/nowhere.jsonl"], "dataset_train_split": ["nonsense"],
    "dataset_test_split": ["nonsense", "--eval_strategy", "steps"],
    "lm_dataset_name": ["/nowhere.jsonl", "--trainer", "minillm"], "output_dir": ["FILE"],
    "resume_from_checkpoint": ["/nowhere"], "optim_args": ["nonsense"], "fsdp": ["nonsense"],
    "parallelism_config": ["nonsense"],
    "dataset_columns": ["nonsense=x"], "eval_dataset_name": ["/nowhere/x.jsonl", "--eval_strategy", "epoch"],
    "dataset_test_size": ["8", "--eval_strategy", "epoch"],
    "label_names": ['["labels"]'], "include_for_metrics": ['["inputs"]'], "eval_accumulation_steps": ["2"],
    "lora_target_modules": ["nonsense", "--use_peft"], "objective": ["nonsense"],
    **{name: ["nonsense"] for name in (
        "eval_strategy", "hub_strategy", "lr_scheduler_type", "optim", "save_strategy", "logging_strategy", "debug",
        "include_num_input_tokens_seen", "report_to", "accelerator_config", "deepspeed",
    )},
    **{name: ["[1]"] for name in (
        "model_init_kwargs", "teacher_model_init_kwargs", "chat_template_kwargs", "teacher_chat_template_kwargs",
        "tokenizer_kwargs", "teacher_tokenizer_kwargs", "activation_checkpointing_kwargs",
        "gradient_checkpointing_kwargs", "lr_scheduler_kwargs",
    )},
    "beta": ["1.5"], "epsilon": ["0"], "gamma": ["-0.1"], "kd_temperature": ["0"], "lm_coef": ["-1"], "lmbda": ["1.1"],
    "min_coverage": ["2"], "num_iterations": ["0"], "reward_clip": ["0"], "strict_top_k": ["-1"], "temperature": ["0"],
    "max_completion_length": ["0"], "num_generations": ["0"], "teacher_mixed_alpha": ["1"], "top_k": ["-1"],
    "top_p": ["0"], "vllm_server_base_url": ["http://user:secret@host"], "vllm_server_host": ["http://host"],
    "vllm_server_timeout": ["0"], "vllm_importance_sampling_clip_max": ["0"], "vllm_gpu_memory_utilization": ["1.5"],
    "vllm_weights_dir": ["FILE", "--use_vllm", "true", "--lmbda", "1"],
}  # fmt: skip


def wrong_for_its_type(name: str) -> list[str]:
    option = OPTIONS[name]
    if option.choices or option.kinds == ("bool",):
        return ["nonsense"]
    return {"int": ["1.5", "many"], "float": ["high", "nan", "inf"], "json": ["nonsense"]}.get(option.kinds[0], [])


def out_of_range(name: str) -> list[str]:
    low, high, _ = RANGES.get(name, (None, None, ""))
    whole = OPTIONS[name].kinds[0] == "int"
    below = [] if low is None else [str(int(low) - 1) if low == int(low) else "0"]
    return below + ([] if high is None else [str(int(high) + 1) if whole else "1" if high < 1 else str(high + 0.1)])


def rows() -> Iterator[tuple[str, list[str]]]:
    for name, option in OPTIONS.items():
        if ("str" not in option.kinds or option.choices) and name not in FREE:
            yield from ((name, [value]) for value in wrong_for_its_type(name))
        yield from ((name, [value]) for value in out_of_range(name))
        if name in WRONG:
            yield name, WRONG[name]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    (root / "file").write_text("a file")
    return {**tiny.save_pair(root), "file": str(root / "file")}


def refused(arguments: list[str], out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one message of a command that cannot work."""
    capsys.readouterr()
    code = main(arguments)
    output = capsys.readouterr()
    assert code == 2, output
    assert output.err.count("diglot: ") == 1 and "Traceback" not in output.err, output.err
    assert not out.exists() or not list(out.rglob("*")), list(out.rglob("*"))
    return output.err


def command(folders: dict[str, str], out: Path, *more: str) -> list[str]:
    options = {
        "--model_name_or_path": folders["student"], "--teacher_model_name_or_path": folders["teacher"],
        "--dataset_name": folders["data.jsonl"], "--output_dir": str(out), "--max_steps": "1", "--use_cpu": "true",
        "--max_completion_length": "4", "--disable_tqdm": "true", "--lmbda": "0",
    }  # fmt: skip
    if "minillm" in more or any(OPTIONS[m[2:]].trainers == ("minillm",) for m in more if m[2:] in OPTIONS):
        options |= {"--trainer": "minillm"}
        del options["--lmbda"]
    for name in more:
        options.pop(name, None)
    return ["train", *(part for pair in options.items() for part in pair), *more]


def test_every_option_has_a_wrong_value_or_a_reason_why_there_is_none() -> None:
    """A new option without a row here fails."""
    covered = {name for name, _ in rows()}
    assert OPTIONS.keys() - covered == FREE.keys()
    numbers = {n for n, o in OPTIONS.items() if o.kinds[0] in ("int", "float")}
    assert numbers <= RANGES.keys() | WRONG.keys()


@pytest.mark.parametrize(("name", "value"), list(rows()), ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_a_wrong_value_is_refused_in_one_message(
    name: str, value: list[str], folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [folders["file"] if part == "FILE" else part for part in value]
    output = refused(command(folders, out, f"--{name}", *arguments), out, capsys)
    assert name in output or arguments[0] in output, output


ASK, SAY = {"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two."}
BROKEN_ROWS = {
    "prompt": [None, 3, "", [], [{"content": "no role"}], [{"role": "user", "content": 3}]],
    "completion": [3, [ASK]],
    "messages": ["How many?", [], [SAY], [{"role": 3, "content": "x"}], [{**ASK, "content": None}]],
    "text": [3, ["a"]],
    "tools": ["[{", [3]],
}


@pytest.mark.parametrize(("column", "value"), [(c, v) for c, values in BROKEN_ROWS.items() for v in values])
def test_a_broken_row_is_named_by_its_index_and_its_file(
    column: str, value: object, folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The columns alone, then with the prompt that they need."""
    data, out = tmp_path / "broken.jsonl", tmp_path / "out"
    beside = {"prompt": "a"} if column in ("completion", "tools") else {}
    good = {"prompt": [ASK]} if column == "prompt" and isinstance(value, list) else {"prompt": "a"}
    good = {"messages": [ASK, SAY]} if column == "messages" else {"text": "a"} if column == "text" else good
    data.write_text("".join(json.dumps(row) + "\n" for row in (good, {**beside, column: value})))
    output = refused(command(folders, out, "--dataset_name", str(data)), out, capsys)
    assert str(data) in output and ("row 1" in output or "line 2" in output or column in output), output
    assert "on_bad_row: skip" in output or "line 2" in output, output


def test_the_table_of_broken_rows_has_every_column() -> None:
    from diglot.data.recognise import EXPECTED

    assert {c for c in ("prompt", "completion", "messages", "text") if f"`{c}`" in EXPECTED} == BROKEN_ROWS.keys() - {
        "tools"
    }


@pytest.mark.parametrize("arguments", [
    ["trane"], ["train", "stray"], ["train", "--max_stepz", "3"], ["train", "--config", "/nowhere"],
    ["objectives", "--colour"], ["objectives", "stray"], ["eval"],
    ["eval", "--colour"], ["report"], ["report", "/nowhere"],
])  # fmt: skip
def test_a_wrong_command_is_refused_in_one_message(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(arguments)
    except SystemExit as error:  # argparse's own way
        code = int(str(error.code))
    assert code == 2 and capsys.readouterr().err
