"""The numbers of a log on a terminal."""

from __future__ import annotations

import io
from types import SimpleNamespace

from tqdm import tqdm

from diglot.watching.recording import NumbersProgress
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


def test_the_numbers_on_the_bar_have_room_in_80_columns() -> None:
    progress, drawn = NumbersProgress(), io.StringIO()
    logs = {"loss": 0.3057, "rollouts/kl_nats_per_byte": 3.091, "align/coverage": 1.0}
    with tqdm(total=3000, initial=1700, ncols=80, file=drawn) as progress.training_bar:
        progress.on_log(None, SimpleNamespace(is_world_process_zero=True, global_step=1700), None, logs)
    last = drawn.getvalue().rstrip().split("\r")[-1]
    assert len(last) <= 80 and last.endswith("nats/byte=3.091]"), last
