"""From options to a served teacher."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from diglot.errors import ConfigError, TeacherError
from diglot.rendering import Renderer
from diglot.teachers import Teacher
from diglot.teachers.address import checked_address, is_address
from diglot.trainers.config import DistillationConfig


def address_of(teacher: Any, args: DistillationConfig) -> str | None:
    """Where the teacher is served, if it is.

    Raises:
        ConfigError: two addresses, an address beside a model, or one that cannot be used.
    """
    name = args.name_of(teacher)
    named = checked_address(str(name), "teacher_model_name_or_path") if is_address(name) else None
    url = args.teacher_model_server_url
    if url is None:
        return named
    address = checked_address(url, "teacher_model_server_url")
    if named is not None:
        raise ConfigError(
            f"teacher_model_server_url={address} and teacher_model_name_or_path={named} are two addresses. Give one; "
            "beside teacher_model_server_url, teacher_model_name_or_path is the model's name at the server."
        )
    if teacher is not None and not isinstance(teacher, str):
        raise ConfigError(
            f"There are two teachers: a {type(teacher).__name__} was passed, and teacher_model_server_url is "
            f"{address}. Give one of them."
        )
    return address


def connect_teacher(
    teacher: Any, teacher_tokenizer: PreTrainedTokenizerBase | None, args: DistillationConfig
) -> Teacher | None:
    """The served teacher that the options name; None if they name none.

    Raises:
        ConfigError: options that do not fit, or packages that are missing.
        TeacherError: its tokenizer is not named, or the server cannot be a teacher.
    """
    address = address_of(teacher, args)
    if address is None:
        return None
    if args.teacher_model_init_kwargs:
        raise ConfigError(f"teacher_model_init_kwargs is for a teacher that is loaded here, not at {address}. Drop it.")
    name = args.name_of(teacher)
    assert not isinstance(name, list)  # `prepare_lanes` takes lists apart
    model = None if is_address(name) else name
    tokenizer, place = teacher_tokenizer, args.teacher_tokenizer_name_or_path or model
    if tokenizer is None:
        tokenizer = _tokenizer(place, address, args)
    renderer = Renderer(
        tokenizer,
        generation_config=_generation_config(place, args),
        chat_template_kwargs=args.teacher_chat_template_kwargs,  # type: ignore[arg-type]
        name="teacher",
    )
    from diglot.teachers.served import ServedTeacher

    return ServedTeacher.connect(
        address,
        renderer,
        model=model,
        max_length=args.teacher_max_length,
        concurrency=args.teacher_server_concurrency,
        timeout=args.teacher_server_timeout,
        budget=args.teacher_server_retry_seconds,
    )


def _tokenizer(place: str | None, address: str, args: DistillationConfig) -> PreTrainedTokenizerBase:
    advice = (
        "Give `teacher_tokenizer_name_or_path` (or pass `teacher_processing_class`): ids are sent to a server, so they "
        "must be its model's."
    )
    if place is None:
        raise TeacherError(f"The teacher at {address} does not say what its tokenizer is. {advice}")
    try:
        return AutoTokenizer.from_pretrained(
            place, revision=args.teacher_model_revision, trust_remote_code=args.teacher_trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise TeacherError(f"No tokenizer of the teacher could be loaded from {place!r}: {error} {advice}") from error


def _generation_config(place: str | None, args: DistillationConfig) -> GenerationConfig | None:
    """The one beside the tokenizer, which may name more ids that end a turn."""
    try:
        revision: dict[str, Any] = {"revision": args.teacher_model_revision} if args.teacher_model_revision else {}
        return GenerationConfig.from_pretrained(place, **revision) if place else None
    except (OSError, ValueError):
        return None
