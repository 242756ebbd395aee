"""A teacher's weights by name: a model id, a folder, or a GGUF file in one."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.utils import cached_file

from diglot.errors import ConfigError, TeacherError

# Weights come from safetensors, unless the arguments of a model say `use_safetensors: false`: a pickle is then read
# without running what is in it.
INERT: dict[str, Any] = {"use_safetensors": True}
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def split_gguf(name: str, init_kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Folder and arguments for `from_pretrained`, where `name` may be the path of a .gguf file."""
    if name.endswith(".gguf"):
        path = Path(name).expanduser()
        return str(path.parent), {"gguf_file": path.name, **init_kwargs}
    return name, dict(init_kwargs)


def load_language_model(name: str, **options: Any) -> PreTrainedModel:
    """A causal language model by name; of a model that reads pictures too, the whole of it, to be used with text.

    `AutoModelForCausalLM` knows some of the latter and loads of others the language part alone, so that a student would
    be saved without its eyes.

    Args:
        options: as of `from_pretrained`.

    Raises:
        ConfigError: the weights are damaged, or a pickle of more than weights.
    """
    seen = {k: options[k] for k in ("revision", "trust_remote_code", "cache_dir", "token") if k in options}
    config: Any = options.get("config")
    if config is None and "gguf_file" not in options:
        try:
            config = AutoConfig.from_pretrained(name, **seen)
        except (OSError, ValueError):  # an adapter's folder, or what the loader below will say in its own words
            config = None
    pictures = config is not None and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    loader: Any = AutoModelForImageTextToText if pictures else AutoModelForCausalLM
    try:
        model: PreTrainedModel = loader.from_pretrained(name, **options)
        return model
    except (SafetensorError, pickle.UnpicklingError) as error:
        why = str(error).strip().split("\n", 1)[0][:200]
        raise ConfigError(
            f"The weights of {name!r} cannot be read ({why}): expected a whole safetensors file, or a pickle of "
            "tensors alone. Get the files anew, or save the model as safetensors."
        ) from error


def copy_processor(name: str, folder: Path, **options: Any) -> None:
    """Put beside a student's weights the files of its processor, if it has one: what turns pictures into tokens."""
    for file in PROCESSOR_FILES:
        source = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **options)
        if source is not None and not (folder / file).exists():
            shutil.copyfile(source, folder / file)


def load_teacher_model(
    name: str, init_kwargs: Mapping[str, Any], *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model that `name` and the arguments for `from_pretrained` say.

    `device_map`, `dtype`, `gguf_file` and `quantization_config` (a mapping with `quant_method`) are among the arguments
    and are those of `transformers`.

    Raises:
        TeacherError: a package that the file or its quantisation needs is not installed, or the method is unknown.
    """
    place, kwargs = split_gguf(name, init_kwargs)
    own = {"revision": revision, "trust_remote_code": trust_remote_code}
    if "gguf_file" not in kwargs:
        own |= INERT
    try:
        return load_language_model(place, **{**own, **kwargs})
    except ImportError as error:
        raise TeacherError(
            f"The teacher {name!r} cannot be loaded with {sorted(kwargs)}: {str(error).strip()} Install it, or leave "
            "these arguments out of teacher_model_init_kwargs."
        ) from error


def window_of(model: PreTrainedModel) -> int | None:
    """The longest input of a model in its own tokens, if it has a limit."""
    window: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return window


def keeps_its_device(model: PreTrainedModel) -> bool:
    """Was the model put somewhere on purpose: by a device map, by quantisation, or on another device than the CPU?"""
    placed = getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False)
    return bool(placed) or model.device.type != "cpu"
