"""What can be known before a model is loaded: names, packages, places. Each is a `ConfigError` that says what to do."""

from __future__ import annotations

import importlib.util
from importlib import import_module
from pathlib import Path
from typing import Any

from diglot.checkpoints import durable
from diglot.cli.names import check_folder, check_model_name
from diglot.cli.script import TrainArguments
from diglot.comparisons import entries_of
from diglot.comparisons.connect import address_of, tokenizer_place
from diglot.errors import ConfigError
from diglot.objectives.registry import check_objective
from diglot.options import DistillationConfig, TeacherOptions
from diglot.teachers.adapter import OWN_BASE

# Tracker -> modules of which one must be there, and what installs it.
TRACKERS = {
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"), "wandb": (("wandb",), "wandb"),
    "trackio": (("trackio",), "trackio"), "mlflow": (("mlflow",), "mlflow"), "comet_ml": (("comet_ml",), "comet_ml"),
    "swanlab": (("swanlab",), "swanlab"), "clearml": (("clearml",), "clearml"), "dvclive": (("dvclive",), "dvclive"),
    "codecarbon": (("codecarbon",), "codecarbon"), "neptune": (("neptune",), "neptune"),
    "kubeflow": (("kubeflow",), "kubeflow"), "flyte": (("flytekit",), "flytekit"), "dagshub": (("dagshub",), "dagshub"),
    "azure_ml": (("azureml",), "azureml-core"),
}  # fmt: skip
# Part of an optimizer's name -> the module that it needs, and what installs it; the first that fits.
OPTIMIZERS = (
    ("bnb", "bitsandbytes", "bitsandbytes"), ("torch_8bit", "torchao", "torchao"), ("torch_4bit", "torchao", "torchao"),
    ("8bit", "bitsandbytes", "bitsandbytes"), ("paged", "bitsandbytes", "bitsandbytes"),
    ("ademamix", "bitsandbytes", "bitsandbytes"), ("galore", "galore_torch", "galore-torch"),
    ("apollo", "apollo_torch", "apollo-torch"), ("lomo", "lomo_optim", "lomo-optim"),
    ("grokadamw", "grokadamw", "grokadamw"), ("stable_adamw", "optimi", "torch-optimi"),
    ("schedule_free", "schedulefree", "schedulefree"), ("anyprecision", "torchdistx", "torchdistx"),
)  # fmt: skip


def preflight(script: TrainArguments, config: DistillationConfig, resume: str | bool | None) -> None:
    """Look at all that needs no model; `ConfigError` for the first that is wrong."""
    check_output(Path(str(config.output_dir)), resume)
    _check_packages(config)
    if script.use_peft and not _installed("peft"):
        raise ConfigError("use_peft needs the package peft, which is not installed: pip install 'diglot[peft]'.")
    for entry in entries_of(config.objective):
        if entry["name"] != "auto":
            check_objective(entry["name"], {k: v for k, v in entry.items() if k not in ("name", "weight")})
    student = str(script.model_name_or_path)
    check_model_name(student, "student", "model_name_or_path", script.model_revision)
    if script.tokenizer_name_or_path is not None:
        check_model_name(
            script.tokenizer_name_or_path, "student's tokenizer", "tokenizer_name_or_path", script.model_revision
        )
    _check_teachers(config)


def _check_teachers(config: DistillationConfig) -> None:
    named = config.teacher_model_name_or_path
    if named is None:
        raise ConfigError("teacher_model_name_or_path is not given. Say --teacher_model_name_or_path: who teaches.")
    option = "teacher_model_name_or_path"
    for one in TeacherOptions.of_list(named, config) if isinstance(named, list) else [TeacherOptions.of(None, config)]:
        if one.tokenizer is not None:
            place = f"tokenizer in {option}" if one.several else "teacher_tokenizer_name_or_path"
            check_model_name(one.tokenizer, "teacher's tokenizer", place, one.revision)
        if (address := address_of(one)) is not None:
            tokenizer_place(one, address)
            import_module("diglot.http.client")  # which says what to install
        elif one.name != OWN_BASE:
            check_model_name(str(one.name), "teacher", option, one.revision)


def check_output(out: Path, resume: str | bool | None) -> None:
    """Can a run be written to `out`? An earlier attempt that left no complete checkpoint is no obstacle."""
    check_folder(out, "output_dir")
    trained = any((out / name).exists() for name in ("config.json", "adapter_config.json"))
    complete = any(durable.problem(one) is None for one in out.glob("checkpoint-*"))
    beside = any(durable.problem(one) is None for one in out.glob(f"{durable.BESIDE}*/checkpoint-*"))
    if resume is True and not complete and not beside:
        elsewhere = "in another output_dir, " if trained else ""
        raise ConfigError(
            f"There is no complete checkpoint in {out}. Start a new run, {elsewhere}without resume_from_checkpoint."
        )
    if isinstance(resume, str):
        durable.read_manifest(Path(resume))
    if resume is None and (complete or beside):
        raise ConfigError(
            f"{out} holds a run already. Choose another output_dir, or continue it with --resume_from_checkpoint."
        )
    if resume is None and trained:
        raise ConfigError(
            f"{out} holds a model already, and no checkpoint to continue from. Choose another output_dir."
        )


def _check_packages(config: DistillationConfig) -> None:
    reported: Any = config.report_to or []
    for tracker in [reported] if isinstance(reported, str) else reported:
        modules, package = TRACKERS.get(tracker, ((), ""))
        if modules and not any(map(_installed, modules)):
            raise ConfigError(
                f"report_to={tracker!r} needs the package {package}, which is not installed. Run: pip install "
                f"{package}, or leave report_to out."
            )
    if config.use_liger_kernel and not _installed("liger_kernel"):
        raise ConfigError(
            "use_liger_kernel needs the package liger-kernel, which is not installed. Run: pip install liger-kernel, "
            "or leave it out."
        )
    optimizer = str(getattr(config.optim, "value", config.optim))
    for part, module, package in OPTIMIZERS:
        if part in optimizer:
            if not _installed(module):
                raise ConfigError(
                    f"optim={optimizer!r} needs the package {package}, which is not installed. Run: pip install "
                    f"{package}, or take adamw_torch."
                )
            return


def check_deepspeed(value: object) -> None:
    """Before the configuration is made: its parent's own message does not say what to do."""
    if value and not _installed("deepspeed"):
        raise ConfigError(
            "deepspeed needs the package deepspeed, which is not installed. Run: pip install deepspeed, or use FSDP 2."
        )


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
