"""Models for the commands that read them, and checks of the arguments that say how."""

from __future__ import annotations

import argparse
import json
import shlex
from typing import Any

from diglot.errors import ConfigError

TOKENIZER_OPTIONS = {"student": "tokenizer_kwargs", "teacher": "teacher_tokenizer_kwargs"}


def check_counts(options: argparse.Namespace, *names: str) -> None:
    """`ConfigError` unless each of these arguments is 1 or more."""
    for name in names:
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} is {getattr(options, name)}, expected 1 or more.")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """How rows are written that are not Diglot's own, as in `diglot train`."""
    parser.add_argument("--dataset_format", metavar="NAME", help="how other programs write such rows, as in train")
    parser.add_argument("--dataset_columns", metavar="NAME=COLUMN,...", help="which columns are read, as in train")


def add_rendering_options(parser: argparse.ArgumentParser) -> None:
    """How messages are put into chat templates, as in `diglot train`."""
    parser.add_argument(
        "--markers",
        default="read",
        choices=["read", "text", "refuse"],
        help="names of control tokens in messages, as in train (default: read)",
    )
    parser.add_argument("--fold_system", action="store_true", help="system messages into the first user's, as in train")


def rendering_options(options: argparse.Namespace) -> dict[str, Any]:
    """The same, as arguments of `Renderer`."""
    return {"markers": options.markers, "fold_system": options.fold_system}


def data_options(options: argparse.Namespace) -> dict[str, Any]:
    """The same, as arguments of `load_dataset`."""
    return {"format": options.dataset_format, "columns": options.dataset_columns}


def json_mapping(text: str) -> dict[str, Any]:
    """The `type` of an option that is a mapping, as JSON."""
    try:
        mapping = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid JSON: {error}") from error
    if not isinstance(mapping, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no mapping")
    return mapping


def add_tokenizer_options(parser: argparse.ArgumentParser, *sides: str) -> None:
    """Arguments for loading the tokenizers of these sides ("student", "teacher"), as in `diglot train`."""
    for side in sides:
        what = f"JSON: arguments for `from_pretrained` of the {side}'s tokenizer, as in train"
        parser.add_argument(f"--{TOKENIZER_OPTIONS[side]}", type=json_mapping, default={}, metavar="JSON", help=what)


def tokenizer_words(options: argparse.Namespace) -> list[str]:
    """The same, as they are written for `diglot train`; none where none are given."""
    values = {option: getattr(options, option) for option in TOKENIZER_OPTIONS.values()}
    return [f"--{option} {shlex.quote(json.dumps(value))}" for option, value in values.items() if value]


def check_place(device: str | None, dtype: str) -> None:
    """`ConfigError` for a device that is not there, or a number type that is none."""
    import torch

    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigError(f"--dtype is {dtype!r}, expected auto, float32, bfloat16 or float16.")
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device is {device!r}, and nothing can be put there ({reason}). Leave it out.") from error


def load_model(name: str, device: str | None, dtype: str, trust_remote_code: bool = False) -> Any:
    """A language model in evaluation mode; by default on the GPU if there is one."""
    import torch

    from diglot.teachers.loading import INERT, load_language_model

    model: Any = load_language_model(name, dtype=dtype, trust_remote_code=trust_remote_code, **INERT)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
