"""Several datasets as one, and rows held out."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from diglot.data import hold_out, load_sources, to_sample
from diglot.errors import ConfigError, DataError

ASK, SAY = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "a."}


@pytest.fixture
def names(tmp_path: Path) -> tuple[str, str]:
    """Six rows of plain text, two of ShareGPT's."""
    plain, chat = tmp_path / "plain.jsonl", tmp_path / "chat.jsonl"
    plain.write_text("".join(json.dumps({"text": f"p{i}"}) + "\n" for i in range(6)))
    turns = [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "a."}]
    chat.write_text("".join(json.dumps({"conversations": turns}) + "\n" for _ in range(2)))
    return str(plain), str(chat)


def both(names: tuple[str, str], *weights: float) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = [{"name": names[0]}, {"name": names[1], "format": "sharegpt"}]
    return [{**entry, "weight": w} for entry, w in zip(entries, weights, strict=True)] if weights else entries


def test_without_weights_each_row_comes_once(names: tuple[str, str]) -> None:
    data = load_sources(both(names), split="train")
    assert [to_sample(row, "row").reply for row in data] == [*(f"p{i}" for i in range(6)), "a.", "a."]
    assert data[7]["__row__"] == f"1 of {names[1]}"


@pytest.mark.parametrize(
    ("weights", "counts"), [((1, 1), (6, 6)), ((3, 1), (6, 2)), ((1, 3), (6, 18)), ((9, 1), (18, 2))]
)
def test_weights_are_shares_of_an_epoch_that_leaves_no_row_out(
    weights: tuple[float, float], counts: tuple[int, int], names: tuple[str, str]
) -> None:
    rows = Counter(row["__row__"].split(" of ")[1] for row in load_sources(both(names, *weights), split="train"))
    assert (rows[names[0]], rows[names[1]]) == counts
    every = {row["__row__"] for row in load_sources(both(names, *weights), split="train")}
    assert len(every) == 8


def test_streams_are_drawn_from_by_their_weights(names: tuple[str, str]) -> None:
    data = load_sources(both(names, 1, 3), split="train", streaming=True, seed=5)
    drawn = Counter(row["__row__"].split(" of ")[1] for row in islice(data, 24))
    assert drawn[names[1]] > drawn[names[0]] > 0


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "list of datasets is empty"), ([{"nam": "x"}], "nam: no key of a dataset"),
    ([{"weight": 1}], "expected a `name`"),
    ([{"name": "x", "weight": 0}], "greater than 0"), ([{"name": "x", "weight": "much"}], "greater than 0"),
])  # fmt: skip
def test_a_list_that_cannot_be_right_is_refused(arguments: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_sources(arguments, split="train")


def test_a_part_that_cannot_be_read_is_named(names: tuple[str, str]) -> None:
    with pytest.raises(DataError, match=r"chat\.jsonl.*--dataset_format sharegpt"):
        load_sources(list(names), split="train")


@pytest.mark.parametrize(("size", "held"), [(0.25, 2), (3, 3)])
def test_held_out_rows_are_on_one_side_only_and_the_same_again(size: float, held: int) -> None:
    data = Dataset.from_list([{"text": str(i)} for i in range(8)])
    train, test = hold_out(data, size, seed=3)
    assert len(test) == held
    assert sorted([*train["text"], *test["text"]]) == sorted(data["text"])
    assert hold_out(data, size, seed=3)[1]["text"] == test["text"]


@pytest.mark.parametrize("size", [0.01, 8, 0.99])
def test_a_side_without_rows_is_refused(size: float) -> None:
    data = Dataset.from_list([{"text": str(i)} for i in range(8)])
    with pytest.raises(ConfigError, match="there must be some on both sides"):
        hold_out(data, size, seed=0)
    with pytest.raises(ConfigError, match="they are streamed"):
        hold_out(data.to_iterable_dataset(), 2, seed=0)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_text_that_is_json_stays_a_text_among_several_datasets(streaming: bool, tmp_path: Path) -> None:
    texts = {"42", "null", '"quoted"', "[1]"}
    for name in ("a", "b"):
        lines = "".join(json.dumps({"prompt": text, "completion": text}) + "\n" for text in sorted(texts))
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    names = [str(tmp_path / f"{name}.jsonl") for name in ("a", "b")]
    rows = load_sources(names, split="train", streaming=streaming)
    assert {(row["prompt"], row["completion"]) for row in rows} == {(text, text) for text in texts}
