"""The teacher behind the proxy: a model of this process, or a server that is asked over kept connections."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import httpx

from diglot.arrays import Ints
from diglot.engines.scores import TeacherScores, score_hidden
from diglot.errors import TeacherError, TeacherUnavailable
from diglot.rendering import Renderer

logger = logging.getLogger(__name__)

_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_LONGEST_PAUSE, _CONNECT_SECONDS = 5.0, 10.0


class Upstream(Protocol):
    """Who is asked."""

    name: str
    max_length: int | None  # tokens of a text, in the teacher's ids

    async def score(self, ids: Ints, top: int) -> TeacherScores:
        """Scores of ids. `TeacherUnavailable` if none can be had now, `TeacherError` if it will not give any."""

    async def ready(self) -> bool:
        """Would it answer now?"""

    async def close(self) -> None:
        """Let go of connections and threads."""


class LocalUpstream:
    """A model of this process, one text at a time.

    Args:
        model: a causal language model of `transformers`, on its device.
        max_length: the model's own limit when not given.
    """

    def __init__(self, model: Any, max_length: int | None = None) -> None:
        from diglot.heads import Head
        from diglot.teachers.loading import window_of

        self.model = model.eval().requires_grad_(False)
        self.head = Head.of(model)
        self.head.verify(model)
        self.name = str(model.config._name_or_path)
        self.max_length = max_length or window_of(model)
        self._one = ThreadPoolExecutor(1, thread_name_prefix="diglot-teacher")

    async def score(self, ids: Ints, top: int) -> TeacherScores:
        """Runs in a thread of its own."""
        return await asyncio.get_running_loop().run_in_executor(self._one, self._score, ids, top)

    def _score(self, ids: Ints, top: int) -> TeacherScores:
        import torch

        from diglot.heads import last_hidden

        inputs = torch.from_numpy(ids)[None].to(self.model.device)
        with torch.no_grad():
            hidden = last_hidden(self.model, inputs, torch.ones_like(inputs))[0]
        return score_hidden(hidden, self.head, ids, top)

    async def ready(self) -> bool:
        """It is loaded."""
        return True

    async def close(self) -> None:
        """Wait for what runs."""
        self._one.shutdown()


class ServedUpstream:
    """vLLM's or SGLang's server. It was checked by the probe of `diglot.teachers` when this was made.

    Args:
        url: as `checked_address` gives it.
        wire: the form that the server speaks.
        renderer: the teacher's.
        timeout: seconds of one attempt.
        budget: seconds after which a request that keeps failing is given up.
    """

    def __init__(
        self,
        url: str,
        wire: Any,
        renderer: Renderer,
        *,
        key: str | None,
        concurrency: int,
        timeout: float,
        budget: float,
        max_length: int | None = None,
    ) -> None:
        self.url, self.wire, self.renderer, self.timeout, self.budget = url, wire, renderer, timeout, budget
        self.name = wire.info.model
        self.max_length = min((n for n in (max_length, wire.info.longest) if n is not None), default=None)
        self._http = httpx.AsyncClient(
            base_url=url,
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
            timeout=httpx.Timeout(timeout, connect=min(timeout, _CONNECT_SECONDS)),
            headers={"Authorization": f"Bearer {key}"} if key else None,
            follow_redirects=False,
        )
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="diglot-reader")

    @classmethod
    def connect(
        cls,
        url: str,
        renderer: Renderer,
        *,
        model: str | None,
        concurrency: int,
        timeout: float,
        budget: float,
        max_length: int | None,
    ) -> ServedUpstream:
        """Find out what the server speaks and whether it can be a teacher. `TeacherError` with the reason if not."""
        from diglot.http.address import key_from_environment
        from diglot.http.client import Client
        from diglot.teachers.probe import check_server
        from diglot.teachers.wire import find_wire

        client = Client(url, connections=1, timeout=timeout, budget=budget)
        try:
            wire = find_wire(client, model)
            check_server(client, wire, renderer)
        finally:
            client.close()
        key = key_from_environment()
        return cls(
            url, wire, renderer, key=key, concurrency=concurrency, timeout=timeout, budget=budget, max_length=max_length
        )

    async def score(self, ids: Ints, top: int) -> TeacherScores:
        """Asks again while no whole answer comes, for as long as the budget lasts: scoring changes nothing there."""
        from diglot.teachers.wire import Asking

        asking = Asking(top=max(top, 1))
        path, body = self.wire.request(ids.tolist(), asking)
        response = await self._answer(path, body)
        if response.status_code != 200:
            raise TeacherError(
                f"The teacher's server answered {response.status_code} to a text of {len(ids)} tokens: "
                f"{response.text[:200]!r}."
            )
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, self._read, response, ids, asking)

    def _read(self, response: httpx.Response, ids: Ints, asking: Any) -> TeacherScores:
        try:
            answer = response.json()
        except (ValueError, RecursionError):
            raise TeacherError(
                f"The teacher's server answered 200 to a text of {len(ids)} tokens with {len(response.content)} bytes "
                f"that are no JSON: {response.content[:80]!r}."
            ) from None
        result = self.wire.read(answer, ids.tolist(), asking)
        return TeacherScores(result.logps, result.top_ids, result.top_logps)

    async def _answer(self, path: str, body: dict[str, Any]) -> httpx.Response:
        began, attempt = time.monotonic(), 0
        while True:
            why = ""
            try:
                # httpx bounds each read alone: a server that sends a byte now and then would never end.
                response = await asyncio.wait_for(self._http.post(path, json=body), self.timeout)
                if response.status_code not in _AGAIN and _is_whole(response):
                    return response
                why = f"{response.status_code}" if response.status_code != 200 else "a 200 that is cut or no JSON"
            except (httpx.RequestError, asyncio.TimeoutError) as error:
                why = type(error).__name__
            pause = random.uniform(0, min(0.1 * 2**attempt, _LONGEST_PAUSE))
            attempt += 1
            if time.monotonic() - began + pause > self.budget:
                raise TeacherUnavailable(
                    f"The teacher's server gave no answer for {time.monotonic() - began:.0f} s ({why}). Ask later."
                )
            logger.warning("the teacher's server: %s; attempt %d again in %.1f s", why, attempt, pause)
            await asyncio.sleep(pause)

    async def ready(self) -> bool:
        """Does it list its models?"""
        try:
            return (await self._http.get("/v1/models", timeout=2.0)).status_code == 200
        except httpx.HTTPError:
            return False

    async def close(self) -> None:
        """Let go of the connections."""
        await self._http.aclose()
        self._readers.shutdown()


def _is_whole(response: httpx.Response) -> bool:
    """A 200 that ends where its JSON does."""
    return response.status_code != 200 or response.content.rstrip().endswith(b"}")
