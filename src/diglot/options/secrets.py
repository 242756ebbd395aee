"""What must never reach a disk: keys and tokens among options."""

from __future__ import annotations

import re
from typing import Any

_SECRET = re.compile(r"(?:^|_)(?:token|api_key|password|secret|authorization)$", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Is this the name of a key, as `hub_token`, `token` or `teacher_api_key`?"""
    return bool(_SECRET.search(name.replace("-", "_")))


def without_secrets(value: Any) -> Any:
    """`value` without the entries of mappings that are named like keys, at every depth."""
    if isinstance(value, dict):
        return {k: without_secrets(v) for k, v in value.items() if not is_secret(str(k))}
    return [without_secrets(v) for v in value] if isinstance(value, (list, tuple)) else value
