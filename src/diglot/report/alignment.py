"""Two tokenisations of one text under each other, in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from diglot.inspection import Span

BETWEEN_CHUNKS, BETWEEN_TOKENS = "|", "~"
LABELS = ("student ", "teacher ")
ONE_TO_ONE = ("green", "cyan")  # in turns, so that neighbours differ
SEVERAL = ("yellow", "magenta")
NOT_COMPARED = "red"

Cell = tuple[str, str, str]  # the student's tokens, the teacher's, style


def print_alignment(spans: Sequence[Span], console: Console | None = None) -> None:
    """Both sides under each other, cut where both have a boundary, `|`; boundaries of one side only are `~`.

    On a terminal chunks are coloured by what they are (not with NO_COLOR), spaces are `·`, line breaks `⏎`. Elsewhere
    the output is plain ASCII with Python's escapes. Bytes that are no text on their own are hex either way.
    """
    console = console or Console()
    fancy = console.is_terminal
    width = console.width
    cells = [_cell(span, i, fancy) for i, span in enumerate(spans)]
    for line in _lines(cells, width - len(LABELS[0]) - 1):
        for side, label in enumerate(LABELS):
            console.print(_row(line, side, label, fancy), soft_wrap=True, highlight=False)
        console.print("", soft_wrap=True)
    console.print(Text(summary(spans)), soft_wrap=True, highlight=False)


def summary(spans: Sequence[Span]) -> str:
    """What the alignment comes to, in one line of ASCII."""
    tokens_s, tokens_t = (sum(len(getattr(span, side)) for span in spans) for side in ("student", "teacher"))
    pairs, lost = sum(span.one_to_one for span in spans), sum(not span.exact for span in spans)
    text = f"{tokens_s} and {tokens_t} tokens, {len(spans)} chunks, {pairs} of them one to one"
    return f"{text}, {lost} not comparable" if lost else text


def _cell(span: Span, at: int, fancy: bool) -> Cell:
    colours = ONE_TO_ONE if span.one_to_one else SEVERAL
    style = colours[at % 2] if span.exact else NOT_COMPARED
    mine, theirs = (
        BETWEEN_TOKENS.join(show(piece, fancy=fancy) for piece in side) for side in (span.student, span.teacher)
    )
    return mine, theirs, style


def show(piece: bytes, *, fancy: bool) -> str:
    """A token's bytes for people: its text, with hex digits (`\\xe4`) for bytes that are no text on their own.

    Not `fancy`: ASCII only, other characters by their number (`\\u00e4`), and the separators escaped.
    """
    text = piece.decode("utf-8", "backslashreplace")
    marks = {" ": "·", "\n": "⏎", "\t": "⇥"} if fancy else {BETWEEN_CHUNKS: "\\x7c", BETWEEN_TOKENS: "\\x7e"}
    return "".join(marks.get(c) or (c if c.isprintable() and (fancy or c.isascii()) else escape(c)) for c in text)


def escape(character: str) -> str:
    """One character in ASCII, so that it cannot be taken for a byte in hex."""
    if character in "\n\r\t":
        return repr(character)[1:-1]
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _lines(cells: Sequence[Cell], width: int) -> Iterator[list[Cell]]:
    """Chunks that fit on one line together; one that is wider than a line has a line of its own."""
    line: list[Cell] = []
    used = 0
    for cell in cells:
        size = max(cell_len(cell[0]), cell_len(cell[1])) + 1
        if line and used + size > width:
            yield line
            line, used = [], 0
        line.append(cell)
        used += size
    if line:
        yield line


def _row(line: Sequence[Cell], side: int, label: str, fancy: bool) -> Text:
    row = Text(label + BETWEEN_CHUNKS)
    for cell in line:
        room = max(cell_len(cell[0]), cell_len(cell[1])) - cell_len(cell[side])
        row.append(cell[side], style=cell[2] if fancy else "")
        row.append(" " * room + BETWEEN_CHUNKS)
    return row
