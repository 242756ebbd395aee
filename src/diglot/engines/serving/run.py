"""The proxy as a process: a socket, a server, and an end that waits for what was accepted."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable

import uvicorn

from diglot.engines.serving.app import Proxy
from diglot.errors import ConfigError

KEY_VARIABLE = "DIGLOT_PROXY_API_KEY"
_IDLE_SECONDS = 120
_BACKLOG = 4096  # connections that wait to be taken


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
        backlog=_BACKLOG,
        timeout_keep_alive=_IDLE_SECONDS,
    )
    return uvicorn.Server(config)


def bind(host: str, port: int) -> socket.socket:
    """The address, taken and not yet listened on. `ConfigError` if it cannot be; port 0 takes a free one."""
    one = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind((host, port))
    except OSError as error:
        one.close()
        raise ConfigError(
            f"--host {host} with --port {port} cannot be listened on: {error.strerror}. Choose another port (0 takes a "
            "free one), or an address of this machine."
        ) from error
    return one


def serve(proxy: Proxy, listener: socket.socket, listening: Callable[[str], None]) -> None:
    """Answer until SIGTERM or SIGINT, then take nothing new, finish what was accepted, and return.

    Args:
        listener: of `bind`.
        listening: called with the address once requests can be sent.
    """
    host, port = listener.getsockname()[:2]
    server = make_server(proxy, host, port)
    listener.listen(_BACKLOG)  # whoever connects before the server runs waits
    listening(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    server.run(sockets=[listener])
