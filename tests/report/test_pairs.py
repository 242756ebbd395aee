"""A pair in the terminal: the inspection and the alignment, as plain text and in colours."""

from __future__ import annotations

import io
import re

import support.tokenizers_zoo as zoo
from rich.console import Console
from support.scored import renderer

from diglot.inspection import Input, align_text, inspect_pair
from diglot.report.alignment import print_alignment
from diglot.report.inspection import print_inspection

TEXT = "def add(a):\n    return 数学 | a~1 👩‍🚀"


def shown(text: str, teacher: str = "inst", **options: object) -> str:
    console = Console(file=io.StringIO(), width=60, **options)  # type: ignore[arg-type]
    print_alignment(align_text(renderer("chatml").encoder, renderer(teacher).encoder, text), console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def unescaped(row: str) -> bytes:
    """The bytes that a plain row spells, separators gone."""
    plain = row.replace("|", "").replace("~", "")
    parts = re.split(r"(\\x[0-9a-f]{2}|\\u[0-9a-f]{4}|\\U[0-9a-f]{8}|\\[nrt])", plain)
    spelt = b""
    for part in parts:
        if part.startswith("\\x"):
            spelt += bytes([int(part[2:], 16)])
        elif part.startswith("\\"):
            spelt += part.encode().decode("unicode_escape").encode()
        else:
            spelt += part.encode()
    return spelt


def test_without_a_terminal_it_is_ascii_and_both_rows_spell_the_text_with_bars_at_the_same_columns() -> None:
    out = shown(TEXT)
    assert out.isascii() and "\x1b" not in out
    rows = {side: [line[8:] for line in out.splitlines() if line.startswith(side)] for side in ("student", "teacher")}
    for mine, theirs in zip(rows["student"], rows["teacher"], strict=True):
        assert [i for i, c in enumerate(mine) if c == "|"] == [i for i, c in enumerate(theirs) if c == "|"]
    for side in rows.values():
        whole = unescaped("".join(side))
        assert re.sub(rb" +", b"", whole) == re.sub(rb" +", b"", TEXT.encode())


def test_bytes_that_are_no_text_are_hex_and_separators_in_the_text_are_escaped() -> None:
    out = shown(TEXT)
    assert "\\xf0\\x9f" in out or "\\x9f" in out
    assert "\\x7c" in out and "\\x7e" in out


def test_on_a_terminal_chunks_are_coloured_and_with_no_color_they_are_not() -> None:
    coloured = shown(TEXT, force_terminal=True, color_system="truecolor")
    assert "\x1b[3" in coloured and "·" in coloured
    plain = shown(TEXT, force_terminal=True, color_system="truecolor", no_color=True)
    assert "\x1b" not in plain and plain == re.sub(r"\x1b\[[\d;]*m", "", coloured)  # the colours, and nothing else


def test_what_cannot_be_compared_is_counted() -> None:
    assert "not comparable" in shown("ÀÉ plain", teacher="wordpiece")
    assert "not comparable" not in shown("plain")


def test_an_empty_text_is_no_error() -> None:
    assert shown("") == "0 and 0 tokens, 0 chunks, 0 of them one to one\n"


def printed(student: str, teacher: str, **options: object) -> str:
    console = Console(file=io.StringIO(), width=150, **options)  # type: ignore[arg-type]
    print_inspection(inspect_pair(*(Input(n, zoo.ALL[n]()) for n in (student, teacher))), console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_inspection_shows_each_part_and_a_command_on_one_line() -> None:
    out = printed("chatml", "turns")
    for part in (
        "Tokenizers",
        "One conversation",
        "Where meaning is dense",
        "Objectives",
        "Verdict",
        "tokens per byte",
    ):
        assert part in out
    assert "<|im_start|>user" in out and "<start_of_turn>user" in out
    assert re.search(r"^  diglot train --model_name_or_path chatml .*--output_dir runs/first$", out, re.M)


def test_the_verdict_comes_first_and_the_tables_fit_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80)
    inspection = inspect_pair(*(Input(n, zoo.ALL[n]()) for n in ("chatml", "turns")))
    print_inspection(inspection, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    verdict = next(i for i, line in enumerate(lines) if line.startswith("Verdict: "))
    assert lines[verdict + 1].startswith("  diglot train ") and verdict < lines.index("Tokenizers".ljust(80))
    assert max(len(line) for line in lines if not line.startswith("  diglot ")) <= 80


def test_without_details_an_inspection_is_a_few_lines() -> None:
    console = Console(file=io.StringIO(), width=80)
    print_inspection(inspect_pair(*(Input(n, zoo.ALL[n]()) for n in ("chatml", "turns"))), console, details=False)
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert (
        len(out.splitlines()) <= 16 and "Verdict: " in out and "--details" in out and "one token on both sides" in out
    )


def test_roles_have_colours_on_a_terminal_only() -> None:
    assert "\x1b[" in printed("chatml", "inst", force_terminal=True, color_system="standard")
    assert "\x1b[" not in printed("chatml", "inst")
