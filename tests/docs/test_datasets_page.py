"""Every row on the page about datasets is read as the page says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from datasets import disable_progress_bars

from diglot.data import load_dataset, to_sample
from diglot.data.files import BUILDERS, COMPRESSED
from diglot.data.formats import FORMATS
from diglot.data.sources import KEYS
from diglot.errors import DataError

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "datasets.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^### (.+?)\n\n(.*?)^```json\n(.+?)\n```", PAGE, re.S | re.M)
NAMES = {"dataset_format": "format", "dataset_columns": "columns"}

disable_progress_bars()


@pytest.mark.parametrize(("heading", "text", "row"), ROWS, ids=[heading for heading, _, _ in ROWS])
def test_a_row_of_the_page_is_read_with_its_option_and_refused_without(
    heading: str, text: str, row: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(json.loads(row)) + "\n", encoding="utf-8")
    options = {NAMES[name]: value for name, value in re.findall(r"`--(\w+) (\S+?)`", text)}
    if options:
        with pytest.raises(DataError, match=re.escape("--" + re.findall(r"`--(.+?)`", text)[0])):
            load_dataset(str(path))
    sample = to_sample(load_dataset(str(path), **options)[0], heading)
    assert sample.reply and sample.reply.strip() in ("four.", "Four.", "Seven.", "Two and two is four.")


def test_the_page_has_every_format_and_every_kind_of_file() -> None:
    formats = set(re.findall(r"`--dataset_format (\w+)`", PAGE))
    assert formats == set(FORMATS)
    assert len(ROWS) == PAGE.count("```json") >= 12
    assert all(f"`{suffix}`" in PAGE for suffix in (*BUILDERS, *COMPRESSED))
    assert all(f"`{key}`" in PAGE.split("Keys of an entry")[1] for key in KEYS)
