"""Several datasets as one, with weights, and rows held out for evaluation."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import datasets
from datasets import Dataset, IterableDataset

from diglot.data.formats import BAD, MEDIA, OWN, WRITTEN
from diglot.data.loading import load_dataset, mapped
from diglot.errors import ConfigError

logger = logging.getLogger(__name__)

KEYS = ("name", "weight", "config", "split", "format", "columns")


def load_sources(
    names: str | Sequence[str | Mapping[str, Any]], *, split: str, streaming: bool = False, seed: int = 0, **common: Any
) -> Any:
    """One dataset of a name, or of several names with weights.

    Without weights each row comes once an epoch. With weights an epoch goes on until each dataset was read as a whole:
    the others' rows come again, as often as the weights say. Streams are drawn from in turn by their weights.

    Args:
        names: a name, or a list of names and of mappings with `name` and any of `weight`, `config`, `split`, `format`,
            `columns`.
        seed: of the draws of streams.
        common: as in `load_dataset`, for those that do not say otherwise.

    Raises:
        ConfigError: an empty list, an unknown key, or a weight that is not greater than 0.
        DataError: as `load_dataset`.
    """
    if isinstance(names, str):
        return load_dataset(names, split=split, streaming=streaming, **common)
    entries = [dict(one) if isinstance(one, Mapping) else {"name": one} for one in names]
    for entry in entries:
        if wrong := sorted(entry.keys() - set(KEYS)):
            raise ConfigError(f"{', '.join(wrong)}: no key of a dataset; keys are {', '.join(KEYS)}.")
        if not isinstance(entry.get("name"), str):
            raise ConfigError(f"A dataset is {entry}, expected a `name` in it, as in {{name: rows.jsonl, weight: 1}}.")
    if not entries:
        raise ConfigError("The list of datasets is empty. Give one name or more.")
    weights = [entry.pop("weight", None) for entry in entries]
    if any(w is not None and not (isinstance(w, (int, float)) and w > 0) for w in weights):
        raise ConfigError(f"The weights of the datasets are {weights}: each must be greater than 0.")
    parts = []
    for entry in entries:
        name = entry.pop("name")
        part = load_dataset(name, **{"split": split, "streaming": streaming, **common, **entry})
        parts.append(_alike(part, name))
    shares = None if weights == [None] * len(weights) else [1.0 if w is None else float(w) for w in weights]
    labels = [one if isinstance(one, str) else one["name"] for one in names]
    return _drawn(parts, shares, seed) if streaming else _joined(parts, shares, labels)


def hold_out(data: Any, size: float, seed: int) -> tuple[Dataset, Dataset]:
    """Rows for training, and rows held out for evaluation: `size` of them, or this share of all if it is below 1.

    Which ones depends on the seed alone; both keep their order.

    Raises:
        ConfigError: nothing would be left on one side, or the rows are a stream.
    """
    if isinstance(data, IterableDataset):
        raise ConfigError("dataset_test_size needs to know how many rows there are, and they are streamed. Drop one.")
    number = round(len(data) * size) if size < 1 else round(size)
    if not 0 < number < len(data):
        raise ConfigError(
            f"dataset_test_size={size} would hold out {number} of {len(data)} rows: there must be some on both sides."
        )
    out = set(random.Random(seed).sample(range(len(data)), number))
    return data.select([i for i in range(len(data)) if i not in out]), data.select(sorted(out))


def _alike(part: Any, name: str) -> Any:
    """The rows with the same columns whatever the dataset, and its name in their number."""
    return mapped(part, partial(_named, name=name), (*OWN, *MEDIA, BAD, WRITTEN, "__row__"))


def _named(row: dict[str, Any], name: str) -> dict[str, Any]:
    own = {column: row.get(column) for column in (*OWN, BAD, WRITTEN)}
    media = {column: True if row.get(column) else None for column in MEDIA}  # which is all that anybody asks
    return {**own, **media, "__row__": f"{row['__row__']} of {name}"}


def _joined(parts: Sequence[Dataset], shares: Sequence[float] | None, names: Sequence[str]) -> Dataset:
    if shares is None:
        return datasets.concatenate_datasets(list(parts))
    most = max(len(part) / share for part, share in zip(parts, shares, strict=True))
    counts = [max(len(part), round(most * share)) for part, share in zip(parts, shares, strict=True)]
    counted = ", ".join(
        f"{n} of {len(part)} rows of {name}" for n, part, name in zip(counts, parts, names, strict=True)
    )
    logger.warning("An epoch reads %s.", counted)
    repeated = [part.select([i % len(part) for i in range(n)]) for n, part in zip(counts, parts, strict=True)]
    return datasets.concatenate_datasets(repeated)


def _drawn(parts: Sequence[IterableDataset], shares: Sequence[float] | None, seed: int) -> IterableDataset:
    total = sum(shares or [1.0] * len(parts))
    probabilities = [share / total for share in shares or [1.0] * len(parts)]
    return datasets.interleave_datasets(
        list(parts), probabilities=probabilities, seed=seed, stopping_strategy="all_exhausted"
    )
