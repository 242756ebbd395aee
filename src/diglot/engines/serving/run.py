"""The proxy as a process: a socket, a server, and an end that waits for what was accepted."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable

import uvicorn

from diglot.engines.serving.app import Proxy
from diglot.errors import ConfigError

KEY_VARIABLE = "DIGLOT_PROXY_API_KEY"
_IDLE_SECONDS = 120


def check_host(host: str, key: str | None) -> None:
    """`ConfigError` for an address that others reach while no key is set."""
    try:
        own = ipaddress.ip_address(host).is_loopback
    except ValueError:
        own = host == "localhost"
    if not own and key is None:
        raise ConfigError(
            f"--host {host} can be reached from other machines and no key is set. Set {KEY_VARIABLE}, which clients "
            "then send as Authorization: Bearer KEY, or leave --host at 127.0.0.1."
        )


def key_for_clients() -> str | None:
    """The key from the environment. `ConfigError`, which does not repeat it, if no HTTP header can hold it."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if key and (not key.isascii() or not key.isprintable()):
        raise ConfigError(f"{KEY_VARIABLE} holds characters that no HTTP header takes. Set it to the key alone.")
    return key or None


def make_server(proxy: Proxy, host: str, port: int) -> uvicorn.Server:
    """The server, not yet listening.

    It waits without a bound for what was accepted, as each step of that has one. Idle connections stay open for longer
    than clients keep theirs (5 s in httpx and uvicorn alike): a request that meets a closing one would be lost.
    """
    config = uvicorn.Config(
        proxy.app(),
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        backlog=4096,
        timeout_keep_alive=_IDLE_SECONDS,
    )
    return uvicorn.Server(config)


def serve(proxy: Proxy, host: str, port: int, listening: Callable[[str], None]) -> None:
    """Answer until SIGTERM or SIGINT, then take nothing new, finish what was accepted, and return.

    Args:
        port: 0 takes a free one.
        listening: called with the address once requests can be sent.
    """
    server = make_server(proxy, host, port)
    socket = server.config.bind_socket()
    shown = f"[{host}]" if ":" in host else host
    listening(f"http://{shown}:{socket.getsockname()[1]}")
    server.run(sockets=[socket])
