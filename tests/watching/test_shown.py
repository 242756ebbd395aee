"""The numbers of a log on a terminal."""

from __future__ import annotations

from diglot.watching.shown import SHOWN, as_text, numbers_that_matter

LOGS = {name: 0.123456 for name, _, _ in SHOWN}


def test_the_numbers_of_a_log_fit_the_terminal_and_none_is_cut_in_two() -> None:
    numbers = numbers_that_matter(LOGS)
    whole = as_text(12_345, numbers)
    assert "\n" not in whole and len(whole) > 80
    for width in (40, 80, 100):
        lines = as_text(12_345, numbers, width).splitlines()
        assert max(map(len, lines)) <= width
        assert " ".join(line.strip() for line in lines) == whole
        assert all(line.endswith(",") for line in lines[:-1]) and all(line.startswith("  ") for line in lines[1:])
    assert as_text(12_345, numbers, len(whole)) == whole  # a terminal that is wide enough
