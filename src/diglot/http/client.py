"""JSON over HTTP to one server: pooled connections, time-outs, bounded answers, and retries only where they are safe.

Scoring changes nothing on the server, so a request may be sent again whenever no whole answer came. What the server
has understood and refused (400 and its kin) is never sent again.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from diglot.errors import ConfigError, DiglotError, TeacherError, TeacherUnavailable
from diglot.http.address import KEY_VARIABLE, is_loopback, key_from_environment

try:
    import httpx
    import tenacity
except ImportError as error:  # pragma: no cover - depends on the installation
    raise ConfigError(
        "A served model needs the packages httpx and tenacity, and one of them is not installed: "
        "pip install 'diglot[server]'."
    ) from error

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CONNECT_SECONDS, _LONGEST_PAUSE = 10.0, 30.0
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_SHOWN = 300  # characters of a server's message that are repeated


class Refused(TeacherError):
    """The server understood the request and said no: sending it again would not help."""

    def __init__(self, message: str, status: int, answer: str) -> None:
        super().__init__(message)
        self.status, self.answer = status, answer


class _Again(Exception):
    """No whole answer came; the same request may be sent again, after `pause` seconds if the server named them."""

    def __init__(self, why: str, pause: float | None = None) -> None:
        super().__init__(why)
        self.pause = pause


@dataclass(frozen=True)
class Purpose:
    """What a server is for: words of messages, where its key is, and what is raised when it is gone."""

    whose: str = "The teacher's server"
    option: str = "teacher_server_retry_seconds"
    key_variable: str = KEY_VARIABLE
    gone: type[DiglotError] = TeacherUnavailable


class Client:
    """One server.

    Args:
        url: as `checked_address` gives it.
        connections: open at a time.
        timeout: seconds for one attempt, from connecting to the last byte.
        budget: seconds after which a request that keeps failing is given up with `TeacherUnavailable`.
    """

    def __init__(
        self,
        url: str,
        *,
        connections: int = 8,
        timeout: float = 120.0,
        budget: float = 600.0,
        purpose: Purpose | None = None,
    ) -> None:
        self.url, self.timeout, self.budget = url, timeout, budget
        self.purpose = purpose or Purpose()
        self._key = key_from_environment(self.purpose.key_variable)
        self._stopped = threading.Event()
        self._http = httpx.Client(
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            # A pool has no more users than connections, so waiting for one is waiting for the server.
            timeout=httpx.Timeout(timeout, connect=min(_CONNECT_SECONDS, timeout)),
            headers={"Authorization": f"Bearer {self._key}"} if self._key else None,
            trust_env=not is_loopback(url),
            verify=url.startswith("https:"),  # making ready for TLS takes longer than many an answer
            follow_redirects=False,  # the key is for this server alone
        )

    def break_off(self) -> None:
        """Repeat nothing of what is under way now."""
        self._stopped.set()
        self._stopped = threading.Event()

    def close(self) -> None:
        """The same, and let go of the connections."""
        self.break_off()
        self._http.close()

    def get(self, path: str, *, limit: int = 2**22) -> Any:
        """The JSON at a path."""
        return self._with_retries("GET", path, None, limit)

    def post(self, path: str, body: Any, *, limit: int = 2**22, once: bool = False) -> Any:
        """The JSON answer to `body`, of at most `limit` bytes. `once`: a request that fails is not sent again.

        Raises:
            Refused: a status that says the request itself is wrong.
            TeacherUnavailable: no whole answer within the budget (or what `purpose` says).
            TeacherError: an answer that is too long.
        """
        return self._with_retries("POST", path, body, limit, once)

    def _with_retries(self, method: str, path: str, body: Any, limit: int, once: bool = False) -> Any:
        began, stopped = time.monotonic(), self._stopped
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Again),
            wait=_pause,
            stop=lambda state: (
                once or time.monotonic() - began + (state.upcoming_sleep or 0) > self.budget or stopped.is_set()
            ),
            sleep=tenacity.sleep_using_event(stopped),
            before_sleep=lambda state: logger.warning(
                "%s: %s Attempt %d; again in %.1f s.",
                self.url,
                state.outcome.exception() if state.outcome else "",
                state.attempt_number,
                state.upcoming_sleep,
            ),
            reraise=True,
        )
        try:
            return retrying(self._once, method, path, body, limit, stopped)
        except _Again as error:
            spent = time.monotonic() - began
            raise self.purpose.gone(
                f"{self.purpose.whose} {self.url} gave no answer for {spent:.0f} s of the {self.budget:.0f} s that are "
                f"allowed ({self.purpose.option}). The last attempt: {error} Start the server again, then go on "
                "from the last checkpoint."
            ) from None

    def _once(self, method: str, path: str, body: Any, limit: int, stopped: threading.Event) -> Any:
        if stopped.is_set():
            raise self.purpose.gone(f"A request to {self.url} was broken off, as the run it belonged to has ended.")
        until = time.monotonic() + self.timeout
        try:
            with self._http.stream(method, self.url + path, json=body) as response:
                text = self._read(response, until, limit)
                status, headers = response.status_code, response.headers
        except httpx.TimeoutException:
            raise _Again(f"{path} took longer than {self.timeout:.0f} s.") from None
        except httpx.TransportError as error:
            raise _Again(f"{path}: {self._safe(str(error)) or type(error).__name__}.") from None
        if status in _AGAIN:
            raise _Again(f"{path} was answered {status}: {self._quoted(text)}.", _retry_after(headers))
        if status != 200:
            raise Refused(
                f"{self.url}{path} was answered {status}, expected 200: {self._quoted(text)}. {self._advice(status)}",
                status,
                self._safe(_message(text)),
            )
        try:
            return json.loads(text)
        except ValueError:
            raise _Again(f"{path} was answered with {len(text)} bytes that are no whole JSON.") from None

    def _read(self, response: httpx.Response, until: float, limit: int) -> bytes:
        parts, size = [], 0
        for part in response.iter_bytes():
            size += len(part)
            if size > limit:
                raise TeacherError(
                    f"{self.url} sends more than the {limit} bytes that the answer can have at most. This is not the "
                    "server that was expected: look at its address and version."
                )
            if time.monotonic() > until:
                raise httpx.ReadTimeout("the whole answer took too long")
            parts.append(part)
        return b"".join(parts)

    def _advice(self, status: int) -> str:
        if status in (401, 403):
            return f"Set the server's key in the environment variable {self.purpose.key_variable}."
        if status == 404:
            return "Look at the address and at the model's name."
        return "The request would be refused again, so it was not repeated."

    def _quoted(self, text: bytes) -> str:
        return repr(self._safe(_message(text))[:_SHOWN])

    def _safe(self, text: str) -> str:
        """Text of the server's without the key, should it repeat it."""
        return text.replace(self._key, "***") if self._key else text


def _pause(state: tenacity.RetryCallState) -> float:
    """What the server asked for, else exponential with full jitter."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, _Again) and error.pause is not None:
        return error.pause
    return tenacity.wait_random_exponential(multiplier=0.5, max=_LONGEST_PAUSE)(state)


def _retry_after(headers: httpx.Headers) -> float | None:
    """Seconds of a `Retry-After` header, which holds a number or a date."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def _message(text: bytes) -> str:
    """What a server says about an error, if it says so in one of the usual places."""
    try:
        content = json.loads(text)
        content = content.get("error", content) if isinstance(content, dict) else content
        content = content.get("message", content.get("detail", content)) if isinstance(content, dict) else content
    except ValueError:
        return text.decode("utf-8", "replace").strip()
    return content if isinstance(content, str) else json.dumps(content)


def answers_of(requests: Sequence[Future[T]]) -> list[T]:
    """The answers, once all have come. Where one fails, requests that have not begun are dropped."""
    try:
        return [one.result() for one in requests]
    except BaseException:
        for one in requests:
            one.cancel()
        raise
