"""The lowest versions that pyproject.toml declares, as constraints for pip, a line each."""

from __future__ import annotations

import re
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def lowest(text: str) -> list[str]:
    """`name==version` for every dependency of the package itself, and of the extra for adapters."""
    required = text.split("\ndependencies = [", 1)[1].split("]", 1)[0] + text.split("\npeft = [", 1)[1].split("]", 1)[0]
    return [f"{name}=={version}" for name, version in re.findall(r'"([\w-]+)>=([\d.]+)"', required)]


if __name__ == "__main__":
    print("\n".join(lowest(PYPROJECT.read_text(encoding="utf-8"))))
