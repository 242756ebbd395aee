"""`diglot estimate`: the memory of a run, from its options, before anything is downloaded or loaded."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diglot.cli.names import check_model_name
from diglot.cli.options import load_options
from diglot.cli.parsing import parse_train
from diglot.errors import ConfigError
from diglot.http.address import is_address
from diglot.memory import GIB, Plan, Shape, itemsize, optimizer_bytes

HELP = """usage: diglot estimate [STUDENT TEACHER] [--config FILE] [--OPTION VALUE ...]

How much memory will a run take? Reads configurations and the headers of
weights, and loads nothing. STUDENT and TEACHER are model ids, folders or sizes
such as 1.5B.
All options are those of `diglot train`; the ones that matter here:
  --config FILE                           a recipe
  --per_device_train_batch_size, --gradient_accumulation_steps,
  --num_generations, --max_length, --max_completion_length
  --bf16, --activation_checkpointing, --optim
  --use_peft, --lora_r, --lora_target_modules, --dtype
  --teacher_model_init_kwargs             '{"dtype": "bfloat16"}', or a
                                          quantization_config

It is the peak of one process without sharding, for the longest texts that the
options allow. An allocator and the CUDA context take about 10% more.

examples:
  diglot estimate HuggingFaceTB/SmolLM2-135M-Instruct Qwen/Qwen2.5-1.5B-Instruct
  diglot estimate 1.2B 8B --max_length 2048 --bf16
  diglot estimate --config recipe.yaml
"""
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([MB])", re.IGNORECASE)
# Safetensors' names of number types -> bytes.
_STORED = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "F4": 0.5}


def estimate(arguments: Sequence[str]) -> int:
    """Print what a run would take, part by part, and what would lower it."""
    words = list(arguments)
    if not words or {"-h", "--help"} & set(words):
        print(HELP, end="")
        return 0
    names: list[str] = []
    while words and not words[0].startswith("-"):
        names.append(words.pop(0))
    if len(names) not in (0, 2):
        raise ConfigError(f"estimate takes a student and a teacher, or neither and a recipe; here: {' '.join(names)}.")
    values = parse_train(words)
    values |= dict(zip(("model_name_or_path", "teacher_model_name_or_path"), names, strict=False))
    plan = plan_of(values)
    _print(plan)
    return 0


def plan_of(values: Mapping[str, Any]) -> Plan:
    """What a step holds, from checked options.

    Raises:
        ConfigError: no student or teacher, or one of which the shape cannot be known.
    """
    options = load_options()
    value = {name: values.get(name, option.default) for name, option in options.items()}
    for name, who in (("model_name_or_path", "student"), ("teacher_model_name_or_path", "teacher")):
        if value[name] is None:
            raise ConfigError(f"The {who} is not given. Say it first, as --{name}, or in the recipe.")
    student = shape_of(value["model_name_or_path"], "student", "model_name_or_path")
    size = _dtype(value["dtype"], value["model_init_kwargs"], student.itemsize if value["use_peft"] else 4.0, student)
    modules = value["lora_target_modules"]
    modules = tuple(modules.split(",") if isinstance(modules, str) else modules) if modules else None
    trained = student.adapter(value["lora_r"], modules) if value["use_peft"] else student.parameters
    bits = _bits(value["model_init_kwargs"])
    texts = value["per_device_train_batch_size"] * value["num_generations"]
    return Plan(
        student,
        student.weights(size, bits) + (4 * trained if value["use_peft"] else 0),
        trained,
        teachers=_teachers(value),
        trained_itemsize=4.0 if value["use_peft"] else size,
        optimizer=optimizer_bytes(value["optim"]),
        texts=texts,
        sampled=0 if value["use_vllm"] else texts * value["gradient_accumulation_steps"],
        length=value["max_length"],
        completion=min(value["max_completion_length"], value["max_length"]),
        compute=2.0 if value["bf16"] or value["fp16"] else 4.0,
        checkpointing=any(value.get(f"{kind}_checkpointing") for kind in ("activation", "gradient")),
    )


def _teachers(value: Mapping[str, Any]) -> tuple[tuple[Shape, float], ...]:
    """Shape and bytes of each teacher that is in this process."""
    named = value["teacher_model_name_or_path"]
    teachers = []
    for one in named if isinstance(named, list) else [named]:
        own = one if isinstance(one, dict) else {"name": one}
        name, kwargs = own.get("name"), own.get("init_kwargs") or value["teacher_model_init_kwargs"]
        served = value["teacher_model_server_url"] or is_address(name)
        if name in (None, "self") or served or (Path(name) / "request.json").exists():
            continue  # it takes no memory here
        shape = shape_of(name, "teacher", "teacher_model_name_or_path")
        teachers.append((shape, shape.weights(_dtype(None, kwargs, shape.itemsize, shape), _bits(kwargs))))
    return tuple(teachers)


def _kwargs(value: Any) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{value!r} is no JSON: {error}") from error
    return value or {}


def _dtype(option: str | None, kwargs: Any, default: float, shape: Shape) -> float:
    """Bytes of a weight: as an option or the arguments for loading say, else the default."""
    own = _kwargs(kwargs)
    name = option or own.get("dtype") or own.get("torch_dtype")
    return default if name is None else shape.itemsize if name == "auto" else itemsize(str(name))


def _bits(kwargs: Any) -> int | None:
    own = _kwargs(kwargs)
    settings = {**own, **own.get("quantization_config", {})}
    return 4 if settings.get("load_in_4bit") else 8 if settings.get("load_in_8bit") else None


def shape_of(name: str, side: str, option: str) -> Shape:
    """The shape of a model by size, folder or hub id.

    Raises:
        ConfigError: there is none of this name, or its files do not say what it is.
    """
    if (size := _SIZE.fullmatch(name.strip())) and not Path(name).exists():
        return Shape.of_size(float(size[1]) * {"M": 1e6, "B": 1e9}[size[2].upper()])
    check_model_name(name, side, option)
    folder = Path(name).expanduser()
    config = _config(folder if folder.is_dir() else name)
    try:
        if config is None:
            raise KeyError("config.json")
        return Shape.of_config(config, *_weights(folder if folder.is_dir() else name))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(
            f"What size the {side} {name!r} ({option}) has cannot be read from its files ({error} is missing). Give "
            "its size in its place, as 1.5B."
        ) from error


def _config(place: Path | str) -> dict[str, Any] | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        path = place / "config.json" if isinstance(place, Path) else Path(hf_hub_download(place, "config.json"))
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, EntryNotFoundError):
        return None
    return config if isinstance(config, dict) else None


def _weights(place: Path | str) -> tuple[float | None, float | None]:
    """Parameters and bytes of each, from the headers of the files; None where there are none to read."""
    if isinstance(place, str):
        return _weights_of_hub(place)
    from safetensors import safe_open

    count = stored = 0.0
    for path in sorted(place.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            for key in file.keys():  # noqa: SIM118
                one = file.get_slice(key)
                elements = math.prod(one.get_shape())
                count, stored = count + elements, stored + elements * _STORED.get(one.get_dtype(), 1)
    return (count, stored / count) if count else (None, None)


def _weights_of_hub(name: str) -> tuple[float | None, float | None]:
    from huggingface_hub import constants, get_safetensors_metadata, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "model.safetensors")
    if isinstance(cached, str):
        return _weights(Path(cached).parent)
    if constants.HF_HUB_OFFLINE:
        return None, None
    try:
        counts = get_safetensors_metadata(name).parameter_count
    except Exception:  # pickles, or a hub that is slow: the configuration is enough
        return None, None
    total = sum(counts.values())
    return float(total), sum(n * _STORED.get(kind, 1) for kind, n in counts.items()) / total


def _print(plan: Plan) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(f"Memory of a step: {plan.texts} texts of up to {plan.length:,} tokens", highlight=False)
    table = Table()
    table.add_column("")
    table.add_column("GiB", justify="right")
    for name, size in plan.parts.items():
        if size:
            table.add_row(name, f"{size / GIB:.2f}")
    table.add_section()
    table.add_row(Text("together", style="bold"), Text(f"{plan.total / GIB:.2f}", style="bold"))
    console.print(table)
    if cheaper := plan.cheaper():
        console.print("What would lower it, each alone:")
        for name, other in cheaper:
            console.print(Text(f"  {other.total / GIB:7.2f} GiB  {name}"), highlight=False)
