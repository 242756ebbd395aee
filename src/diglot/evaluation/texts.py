"""What can be said about a text without any tokenizer."""

from __future__ import annotations

WINDOW = 16  # characters: longer than common words and their endings, shorter than a line


def repetition(text: str) -> tuple[int, int]:
    """How many windows of 16 characters stand earlier in the same text, and how many windows there are.

    Prose has a ratio of a few percent; a text that goes round in a loop comes close to 1.
    """
    windows = [text[i : i + WINDOW] for i in range(len(text) - WINDOW + 1)]
    return len(windows) - len(set(windows)), len(windows)
