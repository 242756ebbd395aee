"""`diglot train`: from checked values to a trained student."""

from __future__ import annotations

import copy
import warnings
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from diglot.cli.blocks import print_end, print_start
from diglot.cli.early import to_resume
from diglot.cli.failures import one_line
from diglot.cli.options import load_options
from diglot.cli.preflight import preflight
from diglot.cli.script import TrainArguments
from diglot.data import hold_out, load_sources
from diglot.errors import ConfigError, DiglotError
from diglot.options.secrets import without_secrets
from diglot.phases import phase
from diglot.teachers.loading import copy_processor
from diglot.trainers import DistillationConfig, GKDConfig, GKDTrainer, MiniLLMConfig, MiniLLMTrainer
from diglot.trainers.base import DistillationTrainer

TRAINERS: dict[str, tuple[type[DistillationTrainer], type[DistillationConfig]]] = {
    "gkd": (GKDTrainer, GKDConfig),
    "minillm": (MiniLLMTrainer, MiniLLMConfig),
}
RESOLVED = "resolved_config.yaml"


def train(values: dict[str, Any]) -> int:
    """Train with options that `parse_train` and `check_early` have checked; returns the exit code.

    Nothing is written before models, data and options are known to fit.
    """
    script, config = split(values)
    if script.dry_run:
        print(yaml.safe_dump(resolved(script, config), sort_keys=False, allow_unicode=True), end="")
        return 0
    out = Path(str(config.output_dir))
    preflight(script, config)
    warnings.filterwarnings("ignore", message="'pin_memory' argument")  # of torch's, on every machine without a GPU
    try:
        trainer = build(script, config)
    except DiglotError:
        raise
    except (ValueError, TypeError, ImportError) as error:  # of the libraries: a model, an adapter, a tracker
        raise ConfigError(f"Models, data and options do not go together: {one_line(error)}") from error
    trainer.dataset_names = _names(script.dataset_name)
    # Before anything of the run that is there is overwritten.
    chosen = trainer.checkpoints.find(to_resume(config.resume_from_checkpoint))
    if trainer.is_world_process_zero():
        out.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(resolved(script, config), sort_keys=False, allow_unicode=True)
        (out / RESOLVED).write_text(text, encoding="utf-8")
        print_start(trainer, script, chosen)
    trainer.train(resume_from_checkpoint=chosen)
    with phase(f"Saving the student to {out}"):
        trainer.save_model()
    trainer.create_model_card()
    if trainer.is_world_process_zero():
        copy_processor(str(script.model_name_or_path), out, revision=script.model_revision)
        print_end(out, script, config.teacher_model_name_or_path)
    return 0


def _names(names: Any) -> list[str]:
    """The name of each dataset."""
    if isinstance(names, str):
        return [names]
    return [one if isinstance(one, str) else str(one["name"]) for one in names]


def split(values: dict[str, Any]) -> tuple[TrainArguments, DistillationConfig]:
    """The script's own options and the trainer's. `ConfigError` for an option that only the other trainer has."""
    own = {f.name for f in fields(TrainArguments)}
    script = TrainArguments(**{k: v for k, v in values.items() if k in own})
    _, config_class = TRAINERS[script.trainer]
    known = {f.name for f in fields(config_class)}
    wrong = sorted(k for k in values if k not in own and k not in known)
    if wrong:
        options = load_options()
        absent = [k for k in wrong if k in options and script.trainer in options[k].trainers]
        reason = f"the installed transformers {version('transformers')}" if absent else f"--trainer {script.trainer}"
        raise ConfigError(f"{', '.join(absent or wrong)}: no option of {reason}. Drop it, or change the other.")
    if "output_dir" not in values:
        raise ConfigError("output_dir is not given. Say --output_dir: the student and its configuration go there.")
    try:
        return script, config_class(**{k: v for k, v in values.items() if k not in own})
    except ConfigError:
        raise
    except (ValueError, TypeError, ImportError) as error:  # the parent's own checks
        raise ConfigError(str(error)) from error


def resolved(script: TrainArguments, config: DistillationConfig) -> dict[str, Any]:
    """Every option with the value in force, as plain values; secrets left out."""
    values: dict[str, Any] = without_secrets({**vars(script), **config.to_dict()})
    return values


def build(script: TrainArguments, config: DistillationConfig) -> DistillationTrainer:
    """The trainer, with models, tokenizers and data loaded."""
    from diglot.vocabulary import load_tokenizer

    train_data, eval_data = datasets_of(script, config)
    keywords: dict[str, Any] = {"train_dataset": train_data, "eval_dataset": eval_data}
    if script.lm_dataset_name is not None:
        if script.trainer != "minillm":
            raise ConfigError(f"lm_dataset_name={script.lm_dataset_name!r} is for --trainer minillm. Drop it.")
        keywords["lm_dataset"] = _data(
            script, config, script.lm_dataset_name, script.dataset_train_split, streaming=False
        )
    options = {"revision": script.model_revision, "trust_remote_code": script.trust_remote_code}
    extra = {"dtype": script.dtype, "attn_implementation": script.attn_implementation}
    extra = {k: v for k, v in extra.items() if v is not None}
    config = copy.copy(config)  # what the student is loaded with is the run's, not the caller's
    init = config.model_init_kwargs if isinstance(config.model_init_kwargs, dict) else {}
    config.model_init_kwargs = {**options, **extra, **init}
    place = str(script.tokenizer_name_or_path or script.model_name_or_path)
    arguments = config.tokenizer_kwargs if isinstance(config.tokenizer_kwargs, dict) else None
    tokenizer = load_tokenizer(place, arguments, **options)
    config.tokenizer_kwargs = None  # they are in the tokenizer now
    trainer_class, _ = TRAINERS[script.trainer]
    student = str(script.model_name_or_path)
    return trainer_class(student, None, config, processing_class=tokenizer, peft_config=_peft(script), **keywords)


def datasets_of(script: TrainArguments, config: DistillationConfig) -> tuple[Any, Any]:
    """What to train on, and what to evaluate on: a dataset of its own, rows held out, or a split; None without
    evaluation.

    Raises:
        ConfigError: two of these are given, or one and no evaluation.
    """
    own = {n: getattr(script, n) for n in ("eval_dataset_name", "dataset_test_size") if getattr(script, n) is not None}
    strategy = str(config.eval_strategy).split(".")[-1].lower()
    wants_eval = strategy != "no"
    if own and not wants_eval:
        raise ConfigError(
            f"{', '.join(own)} is given, and eval_strategy is 'no': nothing is evaluated. Set it to steps."
        )
    if len(own) > 1:
        raise ConfigError(f"{' and '.join(own)} both say what to evaluate on. Give one of them.")
    if wants_eval and not own and names_file(script.dataset_name) and script.dataset_test_split != "train":
        raise ConfigError(
            f"eval_strategy is {strategy!r}, and {script.dataset_name} is a file, whose only split is train, not "
            f"{script.dataset_test_split!r} (dataset_test_split). Give eval_dataset_name, or "
            "dataset_test_size: rows that are held out."
        )
    data = _data(script, config, script.dataset_name, script.dataset_train_split)
    if script.dataset_test_size is not None:
        return hold_out(data, script.dataset_test_size, config.data_seed or config.seed)
    if not wants_eval:
        return data, None
    if script.eval_dataset_name is not None:
        split = "train" if names_file(script.eval_dataset_name) else script.dataset_test_split
        return data, _data(script, config, script.eval_dataset_name, split, streaming=False)
    return data, _data(script, config, script.dataset_name, script.dataset_test_split, streaming=False)


def names_file(names: Any) -> bool:
    """Is this a file, or a list that begins with one? Files have one split, "train"."""
    first = names[0] if isinstance(names, list) and names else names
    name = first.get("name") if isinstance(first, dict) else first
    return isinstance(name, str) and Path(name).expanduser().is_file()


def _data(
    script: TrainArguments, config: DistillationConfig, name: Any, split: str, streaming: bool | None = None
) -> Any:
    assert name is not None
    with phase(f"Reading the data {name}"):
        return load_sources(
            name,
            split=split,
            streaming=script.dataset_streaming if streaming is None else streaming,
            seed=config.data_seed or config.seed,
            config=script.dataset_config,
            format=script.dataset_format,
            columns=script.dataset_columns,
            on_bad_row=config.on_bad_row,
        )


def _peft(script: TrainArguments) -> Any:
    if not script.use_peft:
        return None
    from peft import LoraConfig

    modules = script.lora_target_modules
    return LoraConfig(
        r=script.lora_r,
        lora_alpha=script.lora_alpha,
        lora_dropout=script.lora_dropout,
        target_modules=modules.split(",") if isinstance(modules, str) and "," in modules else modules,
        task_type="CAUSAL_LM",
    )
