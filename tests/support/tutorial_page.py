"""The steps of docs/tutorial.md, smaller, for the tests that take them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "tutorial.md"
SMALLER = {
    "--max_steps 12": "--max_steps 2",
    "--per_device_train_batch_size 16": "--per_device_train_batch_size 2",
    "--max_completion_length 48": "--max_completion_length 8",
    "--rows 24": "--rows 2",
    "[:200]": "[:8]",
    "max_new_tokens=20": "max_new_tokens=2",
}


def steps() -> list[tuple[str, str]]:
    """Language and text of each block, in the page's order, with `SMALLER` numbers."""
    text = PAGE.read_text(encoding="utf-8")
    for number, small in SMALLER.items():
        assert number in text, f"the tutorial no longer says {number!r}; change SMALLER"
        text = text.replace(number, small)
    result = re.findall(r"^```(bash|python)\n(.*?)^```", text, re.S | re.M)
    assert len(result) == text.count("\n```\n"), "a block that is neither bash nor python, or not closed"
    return result
