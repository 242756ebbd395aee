"""Nothing that goes wrong shows a traceback; what can be known is known before a model is loaded."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diglot.checkpoints import durable
from diglot.cli import early, names, recipes
from diglot.cli.early import check_output
from diglot.cli.failures import explain
from diglot.cli.main import main
from diglot.cli.names import check_model_name
from diglot.errors import ConfigError

TRAIN = ["train", "--dataset_name", "org/rows", "--use_cpu"]


def message_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ended with, after the phases that came before: no model was loaded."""
    *phases, message = capsys.readouterr().err.splitlines()
    assert message.startswith("diglot: ") and all(line.startswith("Loading torch") for line in phases)
    return message


@pytest.fixture
def model(tmp_path: Path) -> str:
    """The folder of a model, as far as it is looked at before loading."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--report_to", "wandb"], "report_to='wandb' needs the package wandb"),
    (["--use_liger_kernel"], "use_liger_kernel needs the package liger-kernel"),
    (["--optim", "adamw_torch_8bit"], "optim='adamw_torch_8bit' needs the package torchao"),
    (["--optim", "galore_adamw", "--optim_target_modules", "all-linear"], "needs the package galore-torch"),
    (["--optim", "paged_adamw_8bit"], "needs the package bitsandbytes"),
    (["--deepspeed", "zero.json"], "deepspeed needs the package deepspeed"),
    (["--use_peft"], "use_peft needs the package peft"),
])  # fmt: skip
def test_a_package_that_is_missing_is_named_before_anything_is_loaded(
    arguments: list[str], message: str, model: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(early, "_installed", lambda module: False)
    sides = ["--model_name_or_path", model, "--teacher_model_name_or_path", model, "--output_dir", str(tmp_path / "o")]
    assert main([*TRAIN, *sides, *arguments]) == 2
    output = message_of(capsys)
    assert message in output and "pip install" in output
    assert not (tmp_path / "o").exists()


def test_what_needs_no_library_is_refused_before_torch_is_loaded(model: str, tmp_path: Path) -> None:
    """Ranges, packages, the output folder and what is missing, in one program that then has loaded neither library."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    complete_checkpoint(tmp_path / "run", 3)
    sides = ["--model_name_or_path", model, "--teacher_model_name_or_path", model, "--output_dir"]
    out = str(tmp_path / "o")
    wrong = [
        ([out, "--learning_rate", "-1"], "learning_rate=-1.0 is not allowed"),
        ([out, "--dtype", "float23"], "dtype is 'float23'"),
        ([out, "--optim", "galore_adamw"], "needs the package galore-torch"),
        ([str(tmp_path / "file")], "is a file. Choose a folder"),
        ([str(tmp_path / "run")], "holds a run already"),
        ([out, "--resume_from_checkpoint"], "There is no complete checkpoint"),
    ]
    program = f"""
import sys
from diglot.cli.main import main
print([main({TRAIN!r} + {sides!r} + words) for words, _ in {wrong!r}], "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{[2] * len(wrong)} False", done.stderr
    for (_, message), line in zip(wrong, done.stderr.splitlines(), strict=True):
        assert message in line


@pytest.mark.parametrize(("arguments", "message"), [
    (["--objective", "coverin"], "no objective is called 'coverin'; did you mean 'covering'?"),
    (["--objective", '[{"name": "covering", "kk": 1}]'], "objective 'covering' has no option 'kk'"),
    (["--eval_strategy", "stepz"],
     "eval_strategy='stepz' is not allowed: it must be one of no, steps, epoch; did you mean 'steps'?"),
    (["--optim", "adamv"], "optim='adamv' is not allowed: it must be one of adamw_torch, "),
    (["--resume_from_checkpoint", "runs/checkpoint-9"], "There is no checkpoint runs/checkpoint-9"),
    (["--teacher_model_name_or_path", '[{"name_or_path": "a"}]'], "'name_or_path' is no key of a teacher"),
    (["--teacher_model_name_or_path", '[{"name": "./nope"}]'], "The teacher is './nope'"),
    (["--teacher_model_name_or_path", "http://127.0.0.1:9"], "does not say what its tokenizer is"),
])  # fmt: skip
def test_what_needs_no_model_is_checked_before_one_is_loaded(
    arguments: list[str], message: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = ["--model_name_or_path", model, "--teacher_model_name_or_path", model, "--output_dir", str(tmp_path / "o")]
    assert main([*TRAIN, *sides, *arguments]) == 2
    assert message in message_of(capsys)


def test_a_file_has_no_split_to_evaluate_on(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a"}\n', encoding="utf-8")
    sides = ["--model_name_or_path", model, "--teacher_model_name_or_path", model, "--output_dir", str(tmp_path / "o")]
    assert main(["train", "--dataset_name", str(data), "--use_cpu", *sides, "--eval_strategy", "epoch"]) == 2
    assert "Give eval_dataset_name, or dataset_test_size" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("option", "name", "message"), [
    ("model_name_or_path", "./nope", "The student is './nope' (model_name_or_path)"),
    ("teacher_model_name_or_path", "/nope", "The teacher is '/nope' (teacher_model_name_or_path)"),
    ("dataset_name", "nope.jsonl", "The data is 'nope.jsonl' (dataset_name), and there is no such file"),
    ("eval_dataset_name", "./nope", "The data is './nope' (eval_dataset_name), and there is no such file"),
])  # fmt: skip
def test_a_path_that_is_not_there_is_said_before_any_library_is_loaded(
    option: str, name: str, message: str, model: str
) -> None:
    options = {
        "model_name_or_path": model,
        "teacher_model_name_or_path": model,
        "dataset_name": "org/rows",
        option: name,
    }
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    code = (
        "import sys; from diglot.cli.main import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, "train", *words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"diglot: {message}"), done.stderr


@pytest.mark.parametrize(("words", "message"), [
    (["train", "--output_dir", "x", "--teacher_model_name_or_path", "MODEL"],
     "Not given: model_name_or_path, dataset_name. Say --model_name_or_path ..."),
    (["inspect", "MODEL", "MODEL", "--data", "nope.jsonl"], "The data is 'nope.jsonl' (--data)"),
    (["inspect", "MODEL", "./nope"], "The teacher is './nope' (TEACHER)"),
    (["align", "./nope", "MODEL", "text"], "The student is './nope' (STUDENT)"),
    (["eval", "MODEL", "--data", "nope.jsonl"], "The data is 'nope.jsonl' (--data)"),
    (["eval", "./nope", "--data", "DATA"], "The model is './nope' (MODEL)"),
    (["score", "--teacher", "MODEL", "--data", "./nope", "--out", "x"], "The data is './nope' (--data)"),
    (["score", "--teacher", "MODEL", "--data", "DATA", "--out", "DATA"], "--out is "),
    (["eval", "MODEL", "--data", "DATA", "--rows", "many"], "argument --rows: expected a whole number, not 'many'."),
    (["eval", "MODEL"], "the following arguments are required: --data. See `diglot eval --help`."),
])  # fmt: skip
def test_the_other_commands_say_it_as_soon(words: list[str], message: str, model: str, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    arguments = [{"MODEL": model, "DATA": str(tmp_path / "data.jsonl")}.get(word, word) for word in words]
    code = (
        "import sys; from diglot.cli.main import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"diglot: {message}"), done.stderr


@pytest.mark.parametrize(("option", "side"), [
    ("model_name_or_path", "student"), ("teacher_model_name_or_path", "teacher"),
    ("tokenizer_name_or_path", "student's tokenizer"), ("teacher_tokenizer_name_or_path", "teacher's tokenizer"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["./nope", "no/such", "not a name"])
def test_a_wrong_name_says_whose_it_is_and_by_which_option(
    option: str, side: str, name: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = {"model_name_or_path": model, "teacher_model_name_or_path": model, option: name}
    words = [word for key, value in sides.items() for word in (f"--{key}", value)]
    assert main([*TRAIN, *words, "--output_dir", str(tmp_path / "o")]) == 2
    assert f"The {side} is {name!r} ({option})" in message_of(capsys)


def test_a_folder_without_a_model_and_a_file_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text", encoding="utf-8")
    with pytest.raises(ConfigError, match="a folder without a model"):
        check_model_name(str(tmp_path), "teacher", "--teacher")
    with pytest.raises(ConfigError, match="a file, expected the folder of a model"):
        check_model_name(str(tmp_path / "file"), "teacher", "--teacher")


def test_a_hub_that_does_not_answer_is_given_up_and_the_name_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    silent = threading.Event()
    monkeypatch.setattr(names, "SECONDS", 0.05)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: silent.wait(30))
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"The teacher is 'some/model' \(--teacher\).*cannot be asked"):
        check_model_name("some/model", "teacher", "--teacher")
    silent.set()
    assert names.SECONDS < 10 and time.monotonic() - start < 5


def test_the_hub_has_ten_seconds() -> None:
    assert names.SECONDS <= 10


# ---- where a run is written --------------------------------------------------------------------------------------


def complete_checkpoint(run: Path, step: int) -> None:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights").write_text("w", encoding="utf-8")
    durable.seal(folder, {"step": step})


def test_an_attempt_that_left_no_complete_checkpoint_does_not_hold_the_folder(tmp_path: Path) -> None:
    (tmp_path / "resolved_config.yaml").write_text("{}", encoding="utf-8")
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ConfigError, match=r"no complete checkpoint in .*Start a new run, without resume"):
        check_output(tmp_path, resume=True)
    check_output(tmp_path, resume=None)  # the advice works


def test_a_complete_checkpoint_holds_the_folder_and_resuming_works(tmp_path: Path) -> None:
    complete_checkpoint(tmp_path, 3)
    with pytest.raises(ConfigError, match=r"holds a run already.* or continue it with --resume_from_checkpoint"):
        check_output(tmp_path, resume=None)
    check_output(tmp_path, resume=True)


def test_a_trained_model_without_a_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    for resume in (None, True):
        with pytest.raises(ConfigError, match="another output_dir"):
            check_output(tmp_path, resume)


def test_an_output_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text", encoding="utf-8")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"output_dir is .* is a file"):
            check_output(out, None)


# ---- errors that nobody raised on purpose ------------------------------------------------------------------------


def raised(by: Callable[[], Any]) -> BaseException:
    with pytest.raises(BaseException) as caught:
        by()
    return caught.value


def fail(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize(("error", "message", "code"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "Lower per_device_train_batch_size", 3),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "Lower per_device_train_batch_size", 3),
    (RuntimeError("unable to mmap 536 bytes: Cannot allocate memory (12)"), "Lower per_", 3),
    (OSError(errno.ENOSPC, "No space left on device"), "The disk is full", 3),
    (RuntimeError("I/O error: No space left on device (os error 28)"), "The disk is full", 3),
    (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 2264 vs 2156"), "The disk is full", 3),
    (RuntimeError("I/O error: File too large (os error 27)"), "or a quota is reached", 3),  # a limit of this user's
    (ImportError("No module named 'x'"), "A package is missing", 2),
    (ZeroDivisionError("by\nzero"), "ZeroDivisionError, which Diglot did not expect: by zero", 3),
])  # fmt: skip
def test_an_unexpected_error_is_one_line_and_a_file_with_the_traceback(
    error: BaseException, message: str, code: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(recipes, "recipes", lambda _: fail(error))
    assert main(["recipes"]) == code
    output = capsys.readouterr().err
    assert message in output and output.count("\n") == 1 and "Traceback" not in output
    details = re.search(r"Details: (\S+)", output)
    assert details is not None
    text = Path(details[1]).read_text(encoding="utf-8")
    assert "Traceback" in text and type(error).__name__ in text


def test_a_full_disk_needs_no_room_for_its_own_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    message, code = explain(raised(lambda: fail(OSError(errno.ENOSPC, "No space left on device"))))
    assert message.startswith("The disk is full") and "Details" not in message and code == 3
