"""What can be known before torch is loaded: places, packages, what has to be given. Each is a `ConfigError` that says
what to do."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diglot.checkpoints import durable
from diglot.cli.names import check_folder, check_paths
from diglot.errors import ConfigError

NEEDED = ("model_name_or_path", "teacher_model_name_or_path", "dataset_name", "output_dir")
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


def check_early(values: Mapping[str, Any]) -> None:
    """Look at options as `parse_train` returns them; `ConfigError` for the first that is wrong."""
    check_paths(values)
    if values.get("dry_run"):
        return
    if missing := [name for name in NEEDED if values.get(name) is None]:
        raise ConfigError(
            f"Not given: {', '.join(missing)}. Say --{missing[0]} ... or put it into a recipe; `diglot train --help` "
            "says what each is."
        )
    _check_packages(values)
    check_output(Path(values["output_dir"]).expanduser(), to_resume(values.get("resume_from_checkpoint")))


def to_resume(value: object) -> str | bool | None:
    """What `resume_from_checkpoint` asks for: a folder, the newest checkpoint (True), or none."""
    text = str(value)
    return {"true": True, "false": None, "none": None}.get(text.lower(), text)


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


def _check_packages(values: Mapping[str, Any]) -> None:
    reported = values.get("report_to") or []
    for tracker in [reported] if isinstance(reported, str) else reported:
        modules, package = TRACKERS.get(tracker, ((), ""))
        if modules and not any(map(_installed, modules)):
            raise _missing(f"report_to={tracker!r}", package, "leave report_to out")
    if values.get("use_peft") and not _installed("peft"):
        raise _missing("use_peft", "peft", "train all weights", install="'diglot[peft]'")
    if values.get("deepspeed") and not _installed("deepspeed"):
        raise _missing("deepspeed", "deepspeed", "use FSDP 2")
    if values.get("use_liger_kernel") and not _installed("liger_kernel"):
        raise _missing("use_liger_kernel", "liger-kernel", "leave it out")
    optimizer = str(values.get("optim"))
    for part, module, package in OPTIMIZERS:
        if part in optimizer:
            if not _installed(module):
                raise _missing(f"optim={optimizer!r}", package, "take adamw_torch")
            return


def _missing(option: str, package: str, instead: str, install: str | None = None) -> ConfigError:
    return ConfigError(
        f"{option} needs the package {package}, which is not installed. Run: pip install {install or package}, or "
        f"{instead}."
    )


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
