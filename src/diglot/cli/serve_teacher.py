"""`diglot serve-teacher`: a teacher that any engine can ask in the ids of its own student."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from diglot.cli.loading import add_tokenizer_options, check_counts, check_place, json_mapping, load_model
from diglot.cli.names import check_model_name
from diglot.cli.parsing import Parser
from diglot.cli.screen import show_phases
from diglot.errors import ConfigError
from diglot.http.address import is_address
from diglot.phases import LOADING, phase

EXAMPLE = """example:
  diglot serve-teacher --student Qwen/Qwen3-1.7B \\
      --teacher http://127.0.0.1:8000 --teacher_tokenizer google/gemma-3-1b
  diglot serve-teacher --student HuggingFaceTB/SmolLM2-135M-Instruct \\
      --teacher Qwen/Qwen2.5-1.5B-Instruct --port 8100

Clients ask as they would ask vLLM (POST /v1/completions with prompt_logprobs) or SGLang (POST /generate), in the
student's ids. Keys: DIGLOT_PROXY_API_KEY for clients, DIGLOT_TEACHER_API_KEY for the teacher's server.
"""


def parser() -> Parser:
    """The parser of the command."""
    made = Parser(
        prog="diglot serve-teacher",
        usage="diglot serve-teacher --student NAME --teacher NAME [--OPTION VALUE ...]",
        description="Serve a teacher's log-probs in the ids of a student with another tokenizer.",
        epilog=EXAMPLE,
    )
    add = made.add_argument
    add("--student", required=True, help="The student's tokenizer and chat template: a model id or a folder.")
    add("--teacher", required=True, help="http://HOST:PORT of vLLM or SGLang, a model id, or a folder.")
    add("--teacher_tokenizer", help="The tokenizer of a served teacher, or of one whose weights have none beside them.")
    add("--teacher_name", help="The teacher's name at its server, where that has several.")
    add_tokenizer_options(made, "student", "teacher")
    add("--student_chat_template_kwargs", type=json_mapping, default={}, help="JSON: as the engine renders prompts.")
    add("--teacher_chat_template_kwargs", type=json_mapping, default={}, help="JSON: for the teacher's template.")
    add(
        "--teacher_max_length", type=int, help="Longest text in teacher tokens; the rest of a longer one is not scored."
    )
    add("--credit", default="shared", help="How the tokens of a chunk share its log-prob (default: shared).")
    add(
        "--unscored",
        default="null",
        choices=["null", "zero"],
        help="The log-prob of what is not scored: null, or 0 for clients that need a number (default: null).",
    )
    add("--host", default="127.0.0.1", help="Where to listen (default: 127.0.0.1).")
    add("--port", type=int, default=8100, help="Port; 0 takes a free one (default: 8100).")
    add("--served_model_name", default="teacher", help="The model's name for clients (default: teacher).")
    add("--concurrency", type=int, default=16, help="Texts that the teacher is asked about at a time (default: 16).")
    add("--queue", type=int, default=1024, help="Requests under way; more are answered 429 (default: 1024).")
    add("--max_tokens", type=int, default=131_072, help="Longest context in student tokens (default: 131072).")
    add("--max_logprobs", type=int, default=20, help="Most likeliest ids of a row (default: 20, as vLLM's).")
    add("--timeout", type=float, default=120.0, help="Seconds for one attempt at the teacher's server (default: 120).")
    add("--retry_seconds", type=float, default=60.0, help="Seconds of attempts, then 503 (default: 60).")
    add("--device", help="Where a local teacher runs (default: cuda if there is one, else cpu).")
    add("--dtype", default="auto", help="Its numbers: auto, float32, bfloat16 or float16 (default: auto).")
    return made


def serve_teacher(arguments: Sequence[str]) -> int:
    """Serve until a signal; returns the exit code."""
    options = parser().parse_args(list(arguments))
    check_counts(options, "concurrency", "queue", "max_tokens", "max_logprobs")
    if options.teacher_max_length is not None:
        check_counts(options, "teacher_max_length")
    _check_values(options)
    _check_names(options)
    _need_packages()
    show_phases()
    with phase(LOADING):
        from diglot.engines.credit import find_rule
        from diglot.engines.serving.app import Proxy, Settings
        from diglot.engines.serving.forms import Limits
        from diglot.engines.serving.run import bind, check_host, key_for_clients, serve
    find_rule(options.credit)

    key = key_for_clients()
    check_host(options.host, key)
    settings = Settings(
        key=key,
        model=options.served_model_name,
        queued=options.queue,
        unscored=0.0 if options.unscored == "zero" else None,
        limits=Limits(tokens=options.max_tokens, top=options.max_logprobs),
    )
    with bind(options.host, options.port) as listener:  # before a model is loaded for nothing
        proxy = Proxy(_scorer(options), settings)
        serve(proxy, listener, lambda url: print(f"listening on {url}", file=sys.stderr, flush=True))
    return 0


def _check_values(options: argparse.Namespace) -> None:
    """`ConfigError` for values with which no request could be answered."""
    if options.credit == "gap":
        raise ConfigError(
            "--credit gap shares the difference to the student's own log-probs, which requests to a teacher do not "
            "hold. Choose shared, first, last or pairs, or the function `project_teacher_scores`."
        )
    if not 0 <= options.port <= 65535:
        raise ConfigError(f"--port is {options.port}, expected 0 to 65535.")
    for name in ("timeout", "retry_seconds"):
        if not 0 < getattr(options, name) < math.inf:
            raise ConfigError(f"--{name} is {getattr(options, name)}, expected a number of seconds above 0.")
    if not options.served_model_name:
        raise ConfigError("--served_model_name is empty: clients ask for the model by it.")


def _check_names(options: argparse.Namespace) -> None:
    """`ConfigError` for a name under which there is nothing to load, before any library is."""
    served = is_address(options.teacher)
    if served and options.teacher_tokenizer is None:
        raise ConfigError(
            "--teacher is an address: name its tokenizer with --teacher_tokenizer, as ids are sent to it."
        )
    check_model_name(options.student, "student", "--student")
    if not served:
        check_model_name(options.teacher, "teacher", "--teacher")
    if options.teacher_tokenizer is not None:
        check_model_name(options.teacher_tokenizer, "teacher's tokenizer", "--teacher_tokenizer")


def _need_packages() -> None:
    """`ConfigError` that says what to install."""
    if missing := [name for name in ("starlette", "uvicorn", "httpx", "prometheus_client") if find_spec(name) is None]:
        raise ConfigError(f"serve-teacher needs {', '.join(missing)}: pip install 'diglot[proxy]'.")


def _scorer(options: argparse.Namespace) -> Any:
    from diglot.engines.project import Projector
    from diglot.engines.serving.scorer import Scorer
    from diglot.rendering import Renderer
    from diglot.vocabulary import load_tokenizer

    student = Renderer(
        load_tokenizer(options.student, options.tokenizer_kwargs),
        chat_template_kwargs=options.student_chat_template_kwargs,
        name="student",
    )
    model = None if is_address(options.teacher) else _model(options)
    teacher = Renderer(
        load_tokenizer(options.teacher_tokenizer or options.teacher, options.teacher_tokenizer_kwargs),
        num_embeddings=None if model is None else model.get_input_embeddings().num_embeddings,
        generation_config=None if model is None else model.generation_config,
        chat_template_kwargs=options.teacher_chat_template_kwargs,
        name="teacher",
    )
    upstream = _upstream(options, model, teacher)
    projector = Projector(student, teacher, teacher_max_length=upstream.max_length)
    return Scorer(projector, upstream, concurrency=options.concurrency, credit=options.credit)


def _model(options: argparse.Namespace) -> Any:
    check_place(options.device, options.dtype)
    with phase(f"Loading the teacher {options.teacher}"):
        return load_model(options.teacher, options.device, options.dtype)


def _upstream(options: argparse.Namespace, model: Any, teacher: Any) -> Any:
    from diglot.engines.serving.upstream import LocalUpstream, ServedUpstream
    from diglot.http.address import checked_address

    if model is not None:
        return LocalUpstream(model, options.teacher_max_length)
    return ServedUpstream.connect(
        checked_address(options.teacher, "--teacher"),
        teacher,
        model=options.teacher_name,
        concurrency=options.concurrency,
        timeout=options.timeout,
        budget=options.retry_seconds,
        max_length=options.teacher_max_length,
    )
