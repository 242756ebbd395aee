"""The proxy as an ASGI application: bounded bodies, a bounded queue, a key, and every accepted request answered."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from diglot.engines.project import Projected
from diglot.engines.serving.forms import (
    Limits,
    Query,
    generate_answer,
    parse_body,
    read_generate,
    read_sglang,
    read_vllm,
    sglang_answer,
    vllm_answer,
)
from diglot.engines.serving.metrics import Metrics
from diglot.engines.serving.scorer import Scorer
from diglot.errors import AlignmentError, DataError, DiglotError, RenderingError, TeacherUnavailable, VocabularyError

logger = logging.getLogger(__name__)

_RETRY_SECONDS = "1"
_OF_WHAT_WAS_SENT = (DataError, RenderingError, VocabularyError, AlignmentError)
_LONGEST_MESSAGE = 2000  # characters of an answer that refuses


@dataclass(frozen=True)
class Settings:
    """How much the proxy takes.

    `unscored` is the log-prob of what is not scored, by default none (null): a client that must have a number masks
    these places itself.
    """

    key: str | None = None  # that clients must send as a bearer token
    model: str = "teacher"  # its name for clients
    body_bytes: int = 2**25  # of one request
    queued_bytes: int = 2**28  # of all requests that are under way
    queued: int = 1024  # requests under way
    body_seconds: float = 60.0  # in which a body must arrive
    unscored: float | None = None
    limits: Limits = field(default_factory=Limits)


class _Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, retry: bool = False) -> None:
        super().__init__(message)
        self.status, self.retry = status, retry


@dataclass
class _Held:
    """Bytes of a body that count as under way."""

    count: int = 0


class Proxy:
    """Requests in, scores out."""

    def __init__(self, scorer: Scorer, settings: Settings) -> None:
        self.scorer, self.settings, self.metrics = scorer, settings, Metrics()
        self.under_way = self.bytes_under_way = 0

    def app(self) -> Starlette:
        """The application."""

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            await self.scorer.close()

        return Starlette(
            routes=[
                Route("/health", self.health),
                Route("/ready", self.ready),
                Route("/metrics", self.guarded(self.show_metrics)),
                Route("/v1/models", self.guarded(self.models)),
                Route("/v1/completions", self.guarded(self.completions), methods=["POST"]),
                Route("/inference/v1/generate", self.guarded(self.inference), methods=["POST"]),
                Route("/generate", self.guarded(self.generate), methods=["POST"]),
            ],
            lifespan=lifespan,
        )

    # ---- without scores ----------------------------------------------------------------------------------------

    async def health(self, _: Request) -> Response:
        """The process answers."""
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """A request would be taken, and the teacher would answer it."""
        full = self.under_way >= self.settings.queued
        if full or not await self.scorer.upstream.ready():
            why = "the queue is full" if full else "the teacher does not answer"
            return JSONResponse({"status": why}, 503, {"Retry-After": _RETRY_SECONDS})
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, _: Request) -> Response:
        """For Prometheus."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, _: Request) -> Response:
        """As vLLM lists its models; the window is in the student's tokens."""
        settings = self.settings
        one = {"id": settings.model, "object": "model", "owned_by": "diglot", "root": self.scorer.upstream.name}
        return JSONResponse({"object": "list", "data": [{**one, "max_model_len": settings.limits.tokens}]})

    # ---- scores ------------------------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        """vLLM's form."""
        settings = self.settings

        def read(body: dict[str, Any]) -> Query:
            self._check_model(body)
            return read_vllm(body, settings.limits)

        def answer(query: Query, result: list[Projected]) -> Any:
            return vllm_answer(query, result, settings.model, f"cmpl-{uuid.uuid4().hex}", settings.unscored)

        return await self.scored(request, read, answer)

    async def inference(self, request: Request) -> Response:
        """vLLM's form for ids in and ids out."""

        def read(body: dict[str, Any]) -> Query:
            self._check_model(body)
            return read_generate(body, self.settings.limits)

        def answer(query: Query, result: list[Projected]) -> Any:
            return generate_answer(query, result, uuid.uuid4().hex, self.settings.unscored)

        return await self.scored(request, read, answer)

    async def generate(self, request: Request) -> Response:
        """SGLang's form."""

        def answer(query: Query, result: list[Projected]) -> Any:
            return sglang_answer(query, result, uuid.uuid4().hex, self.settings.unscored)

        return await self.scored(request, lambda body: read_sglang(body, self.settings.limits), answer)

    async def scored(
        self, request: Request, read: Callable[[dict[str, Any]], Query], answer: Callable[[Query, list[Projected]], Any]
    ) -> Response:
        """One request from its body to its answer. What is accepted is answered, whatever the teacher does."""
        held = _Held()
        self.under_way += 1
        self.metrics.under_way.set(self.under_way)
        try:
            if self.under_way > self.settings.queued:
                raise _Refusal(429, f"There are {self.settings.queued} requests under way. Send it again later.", True)
            body = await self._body(request, held)
            began = time.monotonic()
            loop = asyncio.get_running_loop()
            query = await loop.run_in_executor(None, lambda: read(parse_body(body)))
            result = await self._scores(query)
            text = await loop.run_in_executor(None, lambda: json.dumps(answer(query, result), allow_nan=False))
            self.metrics.seconds.observe(time.monotonic() - began)
            for one in result:
                self.metrics.sampled.inc(int(one.sampled.sum()))
                self.metrics.scored.inc(int(one.valid.sum()))
            return Response(text, media_type="application/json")
        finally:
            self.bytes_under_way -= held.count
            self.under_way -= 1
            self.metrics.under_way.set(self.under_way)

    async def _scores(self, query: Query) -> list[Projected]:
        """Of all its texts. If one is refused the others are given up: their request is answered."""

        async def one(k: int) -> Projected:
            try:
                return await self.scorer.score(query.texts[k], query.top)
            except _OF_WHAT_WAS_SENT as error:
                if query.single:
                    raise
                raise type(error)(f"Text {k}: {error}") from error

        tasks = [asyncio.create_task(one(k)) for k in range(len(query.texts))]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _body(self, request: Request, held: _Held) -> bytes:
        """The body, counted in `held` as it comes, within the bounds of one and of all."""
        settings = self.settings
        try:
            declared = int(request.headers.get("content-length", 0))
        except ValueError:
            raise _Refusal(400, "Content-Length is no number.") from None
        if declared > settings.body_bytes:
            raise _Refusal(413, f"The body has {declared} bytes, at most {settings.body_bytes} are taken.")
        stream, body = request.stream(), bytearray()
        until = time.monotonic() + settings.body_seconds
        while True:
            try:
                part = await asyncio.wait_for(anext(stream), max(until - time.monotonic(), 0.001))
            except StopAsyncIteration:
                request.state.whole = True
                return bytes(body)
            except asyncio.TimeoutError:
                raise _Refusal(408, f"The body did not arrive within {settings.body_seconds:.0f} s.") from None
            if len(body) + len(part) > settings.body_bytes:
                raise _Refusal(413, f"The body has more than {settings.body_bytes} bytes.")
            if self.bytes_under_way + len(part) > settings.queued_bytes:
                raise _Refusal(
                    429, f"Bodies of {settings.queued_bytes} bytes are under way. Send it again later.", True
                )
            body += part
            self.bytes_under_way += len(part)
            held.count += len(part)

    async def _drain(self, request: Request) -> None:
        """Read what is left of a refused body, and keep none of it: a client that is still sending hears no answer."""
        if request.method != "POST" or getattr(request.state, "whole", False):
            return
        left, until = self.settings.body_bytes, time.monotonic() + self.settings.body_seconds
        while left > 0 and time.monotonic() < until:
            try:
                message = await asyncio.wait_for(request.receive(), max(until - time.monotonic(), 0.001))
            except asyncio.TimeoutError:
                return
            left -= len(message.get("body", b""))
            if not message.get("more_body"):
                return

    def guarded(self, handle: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """With the key checked, and every error as an answer with a reason."""

        async def run(request: Request) -> Response:
            try:
                self._check_key(request)
                response = await handle(request)
            except Exception as error:
                response = _error(error)
                await self._drain(request)
            self.metrics.requests.labels(request.url.path, str(response.status_code)).inc()
            return response

        return run

    def _check_model(self, body: dict[str, Any]) -> None:
        own = self.settings.model
        if body.get("model") not in (None, own):
            raise _Refusal(404, f"The model {str(body['model'])[:100]!r} does not exist: it is {own!r} here.")

    def _check_key(self, request: Request) -> None:
        key = self.settings.key
        if key is None:
            return
        sent = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(sent.encode(), key.encode()):
            raise _Refusal(401, "The key is missing or wrong. Send it as Authorization: Bearer KEY.")


def _error(error: Exception) -> Response:
    """The answer to a request that failed, in the form of OpenAI's errors."""
    retry, message = False, str(error)
    if isinstance(error, _Refusal):
        status, retry = error.status, error.retry
    elif isinstance(error, _OF_WHAT_WAS_SENT):
        status = 400
    elif isinstance(error, TeacherUnavailable):
        status, retry = 503, True
    elif isinstance(error, DiglotError):
        status = 502
    elif isinstance(error, ClientDisconnect):
        status, message = 400, "The body ended before it was whole."
    else:
        logger.error("a request failed", exc_info=error)
        status, message = 500, "An error of this server's own; its log has the trace."
    headers = {"Retry-After": _RETRY_SECONDS} if retry else None
    message = message[:_LONGEST_MESSAGE].encode(errors="backslashreplace").decode()  # half a character may be quoted
    return JSONResponse({"error": {"message": message, "type": type(error).__name__, "code": status}}, status, headers)
