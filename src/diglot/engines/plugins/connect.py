"""A teacher's server and a pair of tokenizers, as plug-ins need them."""

from __future__ import annotations

import asyncio
from functools import lru_cache

from diglot.engines.project import Projector
from diglot.engines.serving.scorer import Scorer
from diglot.engines.serving.upstream import ServedUpstream
from diglot.http.address import checked_address
from diglot.rendering import Renderer
from diglot.vocabulary import load_tokenizer


def connect(
    student: str,
    teacher_tokenizer: str,
    teacher_url: str,
    *,
    credit: str = "gap",
    concurrency: int = 64,
    timeout: float = 300.0,
    retry_seconds: float = 300.0,
) -> Scorer:
    """A scorer for a pair, made once for each event loop and set of arguments.

    Args:
        student: where the student's tokenizer and template are.
        teacher_tokenizer: the same of the teacher.
        teacher_url: vLLM's or SGLang's server with the teacher; `/v1` or `/generate` at its end is left out.
        retry_seconds: for which a request that gets no answer is repeated.

    Raises:
        ConfigError: an address that is none.
        TeacherError: a server that cannot be a teacher, with the reason.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        loop = None
    return _made(loop, student, teacher_tokenizer, teacher_url, credit, concurrency, timeout, retry_seconds)


@lru_cache(maxsize=8)
def _made(
    loop: asyncio.AbstractEventLoop | None,  # whose connections they are
    student: str,
    teacher_tokenizer: str,
    teacher_url: str,
    credit: str,
    concurrency: int,
    timeout: float,
    retry_seconds: float,
) -> Scorer:
    renderers = [
        Renderer(load_tokenizer(place), name=name)
        for place, name in ((student, "student"), (teacher_tokenizer, "teacher"))
    ]
    url = checked_address(teacher_url.rstrip("/").removesuffix("/generate"), "the teacher's address")
    upstream = ServedUpstream.connect(
        url,
        renderers[1],
        model=None,
        concurrency=concurrency,
        timeout=timeout,
        budget=retry_seconds,
        max_length=None,
    )
    projector = Projector(*renderers, teacher_max_length=upstream.max_length)
    return Scorer(projector, upstream, concurrency=concurrency, credit=credit)
