"""From options to a teacher that is not in this process: behind an address, or as scores that were kept."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from diglot.errors import ConfigError, TeacherError
from diglot.http.address import checked_address, is_address
from diglot.options import DistillationConfig, TeacherOptions
from diglot.rendering import Renderer
from diglot.teachers import Teacher
from diglot.teachers.readout import Readout, load_readout
from diglot.teachers.score_folder import is_scores
from diglot.teachers.scored import ScoredTeacher
from diglot.vocabulary import load_tokenizer


def address_of(options: TeacherOptions) -> str | None:
    """Where the teacher is served, if it is.

    Raises:
        ConfigError: two addresses, an address beside a model, or one that cannot be used.
    """
    name, url = options.name, options.server_url
    named = checked_address(str(name), "teacher_model_name_or_path") if is_address(name) else None
    if url is None:
        return named
    address = checked_address(url, "teacher_model_server_url")
    if named is not None:
        raise ConfigError(
            f"teacher_model_server_url={address} and teacher_model_name_or_path={named} are two addresses. Give one; "
            "beside teacher_model_server_url, teacher_model_name_or_path is the model's name at the server."
        )
    if name is not None and not isinstance(name, str):
        raise ConfigError(
            f"There are two teachers: a {type(name).__name__} was passed, and teacher_model_server_url is "
            f"{address}. Give one of them."
        )
    return address


_ADVICE = (
    "Give `teacher_tokenizer_name_or_path` (or pass `teacher_processing_class`): ids are sent to a server, so they "
    "must be its model's."
)


def tokenizer_place(options: TeacherOptions, address: str) -> str:
    """Where the tokenizer of a served teacher is. `TeacherError` if the options do not say."""
    place = options.tokenizer or (None if is_address(options.name) else options.name_or_path)
    if place is None:
        raise TeacherError(f"The teacher at {address} does not say what its tokenizer is. {_ADVICE}")
    return place


def connect_teacher(
    options: TeacherOptions, tokenizer: PreTrainedTokenizerBase | None, args: DistillationConfig
) -> Teacher | None:
    """The served teacher that the options name; None if they name none.

    Raises:
        ConfigError: options that do not fit, or packages that are missing.
        TeacherError: its tokenizer is not named, or the server cannot be a teacher.
    """
    address = address_of(options)
    if address is None:
        return None
    if options.init_kwargs:
        raise ConfigError(f"teacher_model_init_kwargs is for a teacher that is loaded here, not at {address}. Drop it.")
    model = None if is_address(options.name) else options.name_or_path
    place = options.tokenizer or model
    if tokenizer is None:
        tokenizer = _tokenizer(tokenizer_place(options, address), options, args)
    renderer = Renderer(
        tokenizer,
        generation_config=_generation_config(place, options.revision),
        chat_template_kwargs=options.chat_template_kwargs,
        fold_system=args.fold_system,
        markers=args.markers,
        name="teacher",
    )
    from diglot.teachers.serving import connect_server

    def read_out() -> Readout:
        trust = args.teacher_trust_remote_code
        return load_readout(place or tokenizer.name_or_path, revision=options.revision, trust_remote_code=trust)

    return connect_server(
        address,
        renderer,
        model=model,
        max_length=options.max_length,
        concurrency=args.teacher_server_concurrency,
        timeout=args.teacher_server_timeout,
        budget=args.teacher_server_retry_seconds,
        load_readout=read_out,
    )


def scored_teacher(options: TeacherOptions, tokenizer: Any, args: DistillationConfig) -> ScoredTeacher | None:
    """The folder of scores that the options name; None if they name none.

    Raises:
        ConfigError: the run would write texts of its own, which nobody has scored.
        TeacherError: the scores are unfinished, or were made otherwise than they are to be read.
    """
    name = options.name_or_path
    if not is_scores(name):
        return None
    if getattr(args, "lmbda", 1.0) > 0 or getattr(args, "seq_kd", False):
        raise ConfigError(
            f"{name} holds scores of fixed texts, and this run would write its own (lmbda="
            f"{getattr(args, 'lmbda', 'none: MiniLLM')}, seq_kd={getattr(args, 'seq_kd', False)}). Train GKD with "
            "lmbda=0 and without seq_kd, or name the teacher itself."
        )
    if options.init_kwargs:
        raise ConfigError(f"teacher_model_init_kwargs is for weights, and {name} holds scores only. Drop it.")
    if tokenizer is None and options.tokenizer:
        trust = args.teacher_trust_remote_code
        own = {"revision": options.revision, "trust_remote_code": trust}
        tokenizer = load_tokenizer(options.tokenizer, options.tokenizer_kwargs, **own)
    reading = {
        "score_turns": args.score_turns,
        "system_prompt": options.system_prompt,
        "max_length": options.max_length,
        "template_kwargs": options.chat_template_kwargs,
        "markers": args.markers,
        "fold_system": args.fold_system,
    }
    return ScoredTeacher(str(name), tokenizer, reading)


def _tokenizer(place: str, options: TeacherOptions, args: DistillationConfig) -> PreTrainedTokenizerBase:
    try:
        trust = args.teacher_trust_remote_code
        return load_tokenizer(place, options.tokenizer_kwargs, revision=options.revision, trust_remote_code=trust)
    except (OSError, ValueError, KeyError) as error:
        raise TeacherError(f"No tokenizer of the teacher could be loaded from {place!r}: {error} {_ADVICE}") from error


def _generation_config(place: str | None, revision: str | None) -> GenerationConfig | None:
    """The one beside the tokenizer, which may name more ids that end a turn."""
    try:
        of: dict[str, Any] = {"revision": revision} if revision else {}
        return GenerationConfig.from_pretrained(place, **of) if place else None
    except (OSError, ValueError):
        return None
