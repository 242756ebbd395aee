"""Texts and sampled ids made to break alignments, from a seed; the check is tests/support/pairing.py's."""

from __future__ import annotations

import random

import numpy as np
from support.texts import random_text

from diglot.rendering import Renderer

CLUSTERS = [
    "👩‍🚀", "🏳️‍🌈", "👨‍👩‍👧‍👦", "🇩🇪", "🇩", "👍🏽", "1️⃣", "é", "e\u0301", "q\u0323\u0307", "क्षि", "नि", "ক্ত", "กำ", "한", "\u1112\u1161\u11ab", "ក្ក", "ශ්‍රී",
    "لا", "ﷺ", "\u202eabc\u202c", "ﬁ", "Ⅷ", "㍿", "Å", "Å", "İ", "ß", "ǅ", "か\u3099", "z\u0335\u0321\u0353", "\u00ad", "\ufe0f", "𝒜", "\U000e0041", "\U0010fffd",
]  # fmt: skip
CODE = [
    "def f(x):\n    return x\n", "for (int i = 0; i < n; ++i) {\n\t\ta[i] += 1;\n\t}\n", "<div class=\"a\">\r\n  &nbsp;</div>", "SELECT * FROM t WHERE a='b''c';", "x=lambda:0#",
    "\\begin{align}\n  a &= b\\\\\n\\end{align}", "{\"a\": [1, 2.50, null]}", "if __name__ == '__main__':\n        pass\n\n\n", "```python\nprint('''hi''')\n```", "0x7f_ff + 1e-10", "--\t--> $PATH:/usr",
]  # fmt: skip
SPACES = [" ", "  ", "    ", "\t", "\n", "\r", "\r\n", "\n\n", "\u00a0", "\u2003", "\u3000", "\u200b", "\u2028", "\x0b", "\x0c", "\x85", "▁"]  # fmt: skip
PLANES = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x1FFFF), (0x20000, 0x3FFFF), (0x40000, 0x10FFFF)]  # fmt: skip


def specials(*renderers: Renderer) -> list[str]:
    """How special and added tokens of these tokenizers are spelt."""
    return sorted({str(token) for r in renderers for token in r.tokenizer.get_added_vocab()})


def fuzz_text(draw: random.Random, special: list[str]) -> str:
    """Planes, clusters, control characters, mixed scripts, code, runs of whitespace, special tokens as text."""
    return "".join(_part(draw, special) for _ in range(draw.choice((0, 1, 1, 2, 3, 4, 6, 9))))


def _part(draw: random.Random, special: list[str]) -> str:
    kind = draw.randrange(8)
    if kind == 0:
        return "".join(chr(draw.randint(*draw.choice(PLANES))) for _ in range(draw.randint(1, 4)))
    if kind == 1:
        return "".join(draw.choice(CLUSTERS) for _ in range(draw.randint(1, 3)))
    if kind == 2:
        text = draw.choice(CODE)
        start = draw.randrange(len(text))
        return text[start : start + draw.randint(1, 30)]
    if kind == 3:
        return draw.choice(SPACES) * draw.choice((1, 1, 2, 3, 7, 40))
    if kind == 4 and special:
        token = draw.choice(special)
        return token if draw.random() < 0.7 else token[: draw.randint(1, len(token))]
    if kind == 5:
        return chr(draw.choice((*range(32), 127, *range(0x80, 0xA0), 0xFEFF, 0xFFFD, 0xFFFE)))
    return random_text(draw, 3)


def fuzz_ids(draw: random.Random, student: Renderer, special: list[str]) -> np.ndarray:
    """Ids as a student may sample them: a text's own, cut anywhere, with other ids and half characters among them."""
    ids = student.encoder.encode([fuzz_text(draw, special)])[0].ids.tolist()
    size = len(student.vocabulary)
    for _ in range(draw.choice((0, 0, 1, 1, 2, 5))):
        ids.insert(draw.randint(0, len(ids)), draw.randrange(size))
    if draw.random() < 0.5:
        ids = ids[: draw.randint(0, len(ids))]
    if draw.random() < 0.3:  # the beginning of a character
        char = student.encoder.encode([chr(draw.randint(0x1F300, 0x1FAFF))])[0].ids.tolist()
        ids += char[: draw.randint(0, len(char))]
    if draw.random() < 0.5:
        ids.append(int(draw.choice(student.stop_ids)))
    return np.array(ids, dtype=np.int64)
