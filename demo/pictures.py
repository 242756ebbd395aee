"""Pictures of alignments in docs/pictures, drawn from what `diglot.inspection.align_text` finds for real tokenizers.

    python demo/assets.py get smollm2-135m-instruct tokenizers     # what they are drawn from
    python demo/pictures.py                                        # draws them again

Boxes are tokens. Their colours are those of `diglot align`: green is one token on both sides, amber several, red what
cannot be compared; the lines between the sides are the boundaries that both have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from assets import cache
from transformers import AutoTokenizer

from diglot.inspection import Span, align_text
from diglot.report.alignment import show, summary
from diglot.vocabulary import ByteEncoder, Vocabulary

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"


@dataclass(frozen=True)
class Picture:
    """One file: a text as two tokenizers write it. `student` and `teacher` are names of demo/assets.py."""

    name: str
    student: str
    teacher: str
    text: str


DRAWN = (
    Picture("words", "smollm2-135m-instruct", "gemma3", "The unbelievable naïve 数学 👩"),
    Picture("digits", "qwen3", "llama3", "total = 12345 + 67"),
    Picture("inexact", "qwen3", "llama3", "Un cafe\u0301 noir."),
)

GREEN, AMBER, RED = ("#d3efd9", "#1b7f3b"), ("#fdeec4", "#97650a"), ("#fbd7d3", "#b3261e")
CELL, PAD, LEFT, HIGH, GAP, TOP = (
    9,
    7,
    72,
    30,
    34,
    12,
)  # pixels: a character, air in a box, labels, boxes, between, above


def draw(spans: Sequence[Span]) -> str:
    """The alignment as SVG: the student's tokens above, the teacher's below, chunks side by side."""
    widths = [max(_width(side) for side in (span.student, span.teacher)) for span in spans]
    width = LEFT + max(sum(widths), len(summary(spans)) * CELL) + 2 * PAD
    low = TOP + HIGH + GAP
    parts = [_text(4, TOP + 20, "student", "#333"), _text(4, low + 20, "teacher", "#333")]
    x = LEFT
    for span, room in zip(spans, widths, strict=True):
        fill = RED if not span.exact else GREEN if span.one_to_one else AMBER
        parts += _boxes(span.student, x, TOP, room, fill)
        parts += _boxes(span.teacher, x, low, room, fill)
        parts += [_line(at, TOP + HIGH, low) for at in (x, x + room)]
        x += room
    parts.append(_text(LEFT, low + HIGH + 26, summary(spans), "#333"))
    height = low + HIGH + 38
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="ui-monospace, monospace" font-size="14">\n<rect width="{width}" height="{height}" rx="6" '
        f'fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _labels(side: Sequence[bytes]) -> list[str]:
    return [show(piece, fancy=True) for piece in side]


def _cells(text: str) -> int:
    from rich.cells import cell_len

    return max(cell_len(text), 1)


def _width(side: Sequence[bytes]) -> int:
    return sum(_cells(label) * CELL + 2 * PAD for label in _labels(side))


def _boxes(side: Sequence[bytes], x: int, y: int, room: int, fill: tuple[str, str]) -> Iterator[str]:
    """The tokens of one chunk, stretched over its width."""
    spare, start = room - _width(side), x
    for i, label in enumerate(_labels(side)):
        share = spare * (i + 1) // len(side) - spare * i // len(side)
        size = _cells(label) * CELL + 2 * PAD + share
        yield (
            f'<rect x="{start + 1}" y="{y}" width="{size - 2}" height="{HIGH}" rx="4" fill="{fill[0]}" '
            f'stroke="{fill[1]}"/>'
        )
        yield _text(start + size // 2, y + 20, label, "#111", middle=True)
        start += size


def _text(x: int, y: int, text: str, colour: str, middle: bool = False) -> str:
    anchor = ' text-anchor="middle"' if middle else ""
    return f'<text x="{x}" y="{y}" fill="{colour}"{anchor}>{escape(text)}</text>'


def _line(x: int, y0: int, y1: int) -> str:
    return f'<line x1="{x}" y1="{y0}" x2="{x}" y2="{y1}" stroke="#666" stroke-dasharray="2 3"/>'


def encoder(name: str) -> ByteEncoder:
    """The byte encoder of a tokenizer of demo/assets.py that has been fetched."""
    kind = "models" if name.startswith("smollm2") else "tokenizers"
    tokenizer = AutoTokenizer.from_pretrained(cache() / kind / name)
    return ByteEncoder(tokenizer, Vocabulary.from_tokenizer(tokenizer))


def pictures() -> Iterator[tuple[Path, str]]:
    """Every file of docs/pictures with what it should hold."""
    known: dict[str, ByteEncoder] = {}
    for one in DRAWN:
        for name in (one.student, one.teacher):
            known[name] = known.get(name) or encoder(name)
        yield PICTURES / f"{one.name}.svg", draw(align_text(known[one.student], known[one.teacher], one.text))


if __name__ == "__main__":
    for path, svg in pictures():
        path.write_text(svg, encoding="utf-8")
        print(path)
