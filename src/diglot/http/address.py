"""Where a served teacher is: an address without secrets, and a key from the environment."""

from __future__ import annotations

import ipaddress
import os
from urllib.parse import urlsplit

from diglot.errors import ConfigError

KEY_VARIABLE = "DIGLOT_TEACHER_API_KEY"


def is_address(name: object) -> bool:
    """Does a teacher's name say that it is served?"""
    return isinstance(name, str) and name.lower().startswith(("http://", "https://"))


def checked_address(url: str, option: str, key_variable: str = KEY_VARIABLE) -> str:
    """The base address without a closing slash and without `/v1`, as it may stand in files and messages.

    Raises:
        ConfigError: no http(s) address, or one that holds credentials, a query or a fragment. The message repeats
            none of these.
    """
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ConfigError(f"{option} is no address that can be read. Write http://HOST:PORT.") from None
    if parts.scheme.lower() not in ("http", "https") or not host:
        raise ConfigError(f"{option} must begin with http:// or https:// and name a host. Write http://HOST:PORT.")
    shown = f"{parts.scheme.lower()}://{f'[{host}]' if ':' in host else host}{'' if port is None else f':{port}'}"
    if "@" in parts.netloc:
        raise ConfigError(
            f"{option} holds a user name or password for {shown}. They would end up in configurations and logs: take "
            f"them out, and give the server's key in the environment variable {key_variable}."
        )
    if parts.query or parts.fragment:
        raise ConfigError(
            f"{option} has something behind '?' or '#' for {shown}, where keys are often written. Give the address "
            f"alone, and a key in the environment variable {key_variable}."
        )
    return shown + parts.path.rstrip("/").removesuffix("/v1").rstrip("/")


def is_loopback(url: str) -> bool:
    """Is the address on this machine? Then no proxy stands between."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def key_from_environment(variable: str = KEY_VARIABLE) -> str | None:
    """The server's key. `ConfigError`, which does not repeat it, if it cannot stand in an HTTP header."""
    key = os.environ.get(variable, "").strip()
    if not key:
        return None
    if not key.isascii() or not key.isprintable():
        raise ConfigError(
            f"{variable} holds characters that no HTTP header takes (line breaks, or others than ASCII). Set it to "
            "the key alone."
        )
    return key
