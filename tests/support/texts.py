"""Texts that break alignments: hand-picked, and random ones from a seed."""

from __future__ import annotations

import random

HARD = [
    "plain English text, with commas.", " leading and trailing  ", "two  spaces   three    four", "\t\tdef f(x):\n        return x + 1\n\n\n",
    "line\r\nline\r\n", "café cafe\u0301 naïve", "👩‍🚀🏳️‍🌈👨‍👩‍👧‍👦 emoji with joiners", "数学は楽しい。今天天气很好", "مرحبا بالعالم שלום עולם",
    "e\u0301\u0323\u0308 combining", "<|im_end|> <eos> </s> <|endoftext|> as text", "▁ metaspace ▁▁", "ﬁ ligature Å ½ ①",
    "\x00\x07\x1b[0m control", "0123456789 12 345 6789.01", "\U0001d400\ue000\U000e0001 planes", "\u200b\u200d\ufeff invisible",
    "한국어 조사 \u1112\u1161\u11ab", "नमस्ते दुनिया", "ไทยไม่มีช่องว่าง", "x" * 200, " " * 60 + "x", "\n" * 30, "a", " ", "\n", "",
]  # fmt: skip

_RANGES = [
    (0x20, 0x7E), (0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x5FF), (0x600, 0x6FF), (0x900, 0xDFF), (0xE00, 0xE7F),
    (0x1100, 0x11FF), (0x2000, 0x206F), (0x2190, 0x2BFF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xF8FF),
    (0xFB00, 0xFDFF), (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF), (0xE0001, 0xE007F),
]  # fmt: skip


def random_text(draw: random.Random, pieces: int = 12) -> str:
    """A mixture of hand-picked parts, whitespace and random characters of one script at a time."""
    parts = []
    for _ in range(draw.randint(0, pieces)):
        choice = draw.random()
        if choice < 0.25:
            text = draw.choice(HARD)
            start = draw.randrange(len(text) + 1)
            parts.append(text[start : start + draw.randint(1, 12)])
        elif choice < 0.4:
            parts.append(draw.choice([" ", "  ", "\n", "\r\n", "\t", "    "]))
        else:
            low, high = draw.choice(_RANGES)
            parts.append("".join(chr(draw.randint(low, high)) for _ in range(draw.randint(1, 6))))
    return "".join(parts)
