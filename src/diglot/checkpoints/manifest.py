"""What a run is, as far as a checkpoint must agree with it: models, tokenizers, templates, objective, versions."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from diglot.comparisons import Comparison, Term
from diglot.errors import CheckpointError
from diglot.options import DistillationConfig
from diglot.rendering import Renderer
from diglot.teachers import Teacher
from diglot.teachers.adapter import has_own_model
from diglot.teachers.scored import ScoredTeacher

logger = logging.getLogger(__name__)

VERSIONS = ("diglot", "torch", "transformers")
# Options outside the group "Objective" that the trajectory depends on: others may be given on resume, with a warning.
SHAPING = (
    "seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay",
    "max_length", "max_completion_length", "temperature", "top_p", "top_k", "num_generations", "teacher_mixed_alpha",
    "rollout_ahead", "score_turns", "score_reasoning", "score_tool_calls", "bf16", "fp16", "max_grad_norm", "optim",
    "markers", "fold_system", "on_bad_row",
)  # fmt: skip
_WITHOUT_EFFECT = {"rows_per_chunk", "min_coverage", "objective"}  # the terms in force stand for the last
_UNSTABLE = {"_name_or_path", "transformers_version", "architectures", "dtype", "use_cache"}  # change when saved or run
_SAMPLE = 16  # values of each tensor that a fingerprint looks at


def describe_model(model: PreTrainedModel, renderer: Renderer, weights: bool) -> dict[str, Any]:
    """Name, revision, configuration, tokenizer and template of one side; its weights too if they do not change."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in _UNSTABLE}
    return {
        "name": model.config._name_or_path or None,
        "revision": getattr(model.config, "_commit_hash", None),
        "dtype": str(model.dtype),
        "config": json.loads(json.dumps(config, default=str)),
        "weights": fingerprint(model) if weights else None,
        **_describe_reading(renderer),
    }


def describe_teacher(teacher: Teacher) -> dict[str, Any]:
    """As `describe_model`, as far as it can be known: of the student's own base and of a server, how they read."""
    if has_own_model(teacher):
        return describe_model(teacher.model, teacher.renderer, weights=True)
    description: dict[str, Any] = {"kind": type(teacher).__name__, **_describe_reading(teacher.renderer)}
    if isinstance(teacher, ScoredTeacher):
        description["scores"] = teacher.folder.request
    return description


def _describe_reading(renderer: Renderer) -> dict[str, Any]:
    template = getattr(renderer.tokenizer, "chat_template", None)
    return {
        "tokenizer": renderer.vocabulary.content_hash,
        "template": None if template is None else digest(template),
    }


def describe_objective(trainer: str, terms: Sequence[Term], args: DistillationConfig) -> dict[str, Any]:
    """The trainer, its terms with their weights, and every option under the heading "Objective"."""
    heading = [f.name for f in fields(args) if f.metadata.get("group") == "Objective" and f.name not in _WITHOUT_EFFECT]
    return {
        "trainer": trainer,
        "terms": [[term.name, term.weight] for term in terms if not term.built_in],
        "requested": args.objective,
        **{name: getattr(args, name) for name in heading},
        "beta": [getattr(term.objective, "beta", None) for term in terms if not term.built_in],
    }


def describe_run(
    trainer: str, student: PreTrainedModel, comparisons: Sequence[Comparison], args: DistillationConfig
) -> dict[str, Any]:
    """What a checkpoint must agree with to be resumed: `student`, `teacher` and `objective`, as plain values."""
    described = [describe_teacher(one.teacher) for one in comparisons]
    several = {c.label: {**one, "weight": c.weight} for c, one in zip(comparisons, described, strict=True)}
    return {
        "student": describe_model(student, comparisons[0].reader.student, weights=False),
        "teacher": several if len(several) > 1 else described[0],
        "objective": describe_objective(trainer, comparisons[0].terms, args),
    }


def run_facts(args: Any) -> dict[str, Any]:
    """What else a manifest says: options, versions and processes that the last bit depends on."""
    return {
        "options": {name: getattr(args, name) for name in SHAPING if hasattr(args, name)},
        "versions": versions(),
        "world": {"processes": args.world_size, "device": args.device.type},
    }


def versions() -> dict[str, str]:
    """Of the packages that the last bit depends on."""
    return {name: version(name) for name in VERSIONS}


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON."""
    text = json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@torch.no_grad()
def fingerprint(model: torch.nn.Module) -> str | None:
    """Names, shapes and a few values of every parameter, as a digest: tells other weights, not a single changed one.

    None where parameters are not whole in this process.
    """
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        if type(p.data) is not torch.Tensor or p.device.type == "meta" or not p.numel():
            return None
        flat = p.reshape(-1)
        last, number = flat.numel() - 1, min(_SAMPLE, flat.numel())
        at = torch.linspace(0, last, number, dtype=torch.float64).long().to(p.device)  # float32 rounds up past the end
        digest.update(f"{name}/{tuple(p.shape)}/{flat[at].double().cpu().tolist()}".encode())
    return digest.hexdigest()


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Refuse a checkpoint of another run; warn of what only keeps the rest from being bit for bit the same.

    Raises:
        CheckpointError: student, teacher, tokenizers, templates or objective differ; says which, with both values.
    """
    differing = [d for part in ("student", "teacher", "objective") for d in _differing(part, saved, now)]
    if differing:
        raise CheckpointError(
            f"{folder} belongs to another run: {'; '.join(differing)}. Resume with the models and options of the "
            "checkpoint, or start a new run from its weights: model_name_or_path and another output_dir."
        )
    notes = [d for part in ("options", "versions", "world") for d in _differing(part, saved, now)]
    if notes:
        logger.warning(
            "%s is resumed, but what follows is not bit for bit what the run would have done: %s.",
            folder,
            "; ".join(notes),
        )


def _differing(where: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    before, after = (_flat(side.get(where) or {}) for side in (saved, json.loads(json.dumps(now, default=str))))
    messages = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        unknown = key in ("name", "revision", "weights") and None in (old, new)
        if old == new or unknown or (key == "name" and (_is_local(str(old)) or _is_local(str(new)))):
            continue
        messages.append(f"{where}.{key} is {old!r} in the checkpoint, {new!r} now")
    return messages


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dots in the names."""
    flat: dict[str, Any] = {}
    for key, one in value.items():
        flat |= _flat(one, f"{prefix}{key}.") if isinstance(one, Mapping) and one else {f"{prefix}{key}": one}
    return flat


def _is_local(name: str) -> bool:
    """A folder may be moved; what is in it is compared by content."""
    return os.path.isabs(name) or name.startswith(".") or Path(name).exists()
