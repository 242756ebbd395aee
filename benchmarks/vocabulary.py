"""Seconds until the vocabularies of real tokenizers are ready: all built, and with what is kept on disk.

Each number is the median of `--repeats` rounds; a round does everything once, so that noise of the machine falls on
all of it. `copied` is the encoder where the tokenizer's model has to be copied: a Unigram, a WordPiece, a BPE with
dropout. `kept` columns read entries that an earlier round wrote into a folder that is removed at the end.

    python benchmarks/vocabulary.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from measure import load_tokenizer, machine
from transformers import PreTrainedTokenizerBase

from diglot.rendering import Renderer
from diglot.vocabulary import ByteEncoder, Vocabulary
from diglot.vocabulary.maps import greedy_tokens, shared_prefix_cells

NAMES = ("gemma3", "qwen3", "deepseek_v3", "llama3", "smollm2")
PAIRS = (("smollm2", "gemma3"), ("qwen3", "gemma3"), ("qwen3", "llama3"))


def tables(place: str) -> Any:
    """A context in which tables are kept there."""
    return mock.patch.dict(os.environ, {"DIGLOT_TABLES": place})


def fresh(vocabulary: Vocabulary) -> Vocabulary:
    """The same table with nothing worked out from it yet but its hash."""
    copy = dataclasses.replace(vocabulary)
    _ = copy.content_hash
    return copy


def of_one(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, folder: str) -> dict[str, float]:
    """Seconds of one round for one tokenizer."""
    times = {
        "table": _seconds(lambda: Vocabulary.from_tokenizer(tokenizer)),
        "encoder": _seconds(lambda: ByteEncoder(tokenizer, vocabulary)),
        "renderer": _seconds(lambda: Renderer(tokenizer)),
        "to text": _seconds(tokenizer.backend_tokenizer.to_str),
    }
    with mock.patch("diglot.vocabulary.backend._can_share", lambda *_: False):
        times["copied"] = _seconds(lambda: ByteEncoder(tokenizer, vocabulary))
    for name, place in (("trie", "off"), ("trie kept", folder)):
        copy = fresh(vocabulary)
        with tables(place):
            times[name] = _seconds(lambda copy=copy: copy.trie)
    return times


def of_pair(student: Vocabulary, teacher: Vocabulary, folder: str) -> dict[str, float]:
    """Seconds of one round for one pair, tries not counted."""
    times = {}
    for suffix, place in (("", "off"), (" kept", folder)):
        with tables(place):
            s, t = fresh(student), fresh(teacher)
            _ = s.trie, t.trie
            times["shared" + suffix] = _seconds(lambda s=s, t=t: s.shared(t))
            times["greedy" + suffix] = _seconds(lambda s=s, t=t: greedy_tokens(t, s))
            times["cells" + suffix] = _seconds(lambda s=s, t=t: shared_prefix_cells(s, t))
    return times


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _show(title: str, rows: dict[str, dict[str, float]]) -> None:
    columns = list(next(iter(rows.values())))
    print(f"{title:20s}" + "".join(f"{name:>12s}" for name in columns))
    for name, row in rows.items():
        print(f"{name:20s}" + "".join(f"{row[column]:12.3f}" for column in columns))


def main() -> None:
    """Print both tables, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    print(machine())
    loaded = {name: load_tokenizer(name) for name in NAMES}
    vocabularies = {name: Vocabulary.from_tokenizer(tokenizer) for name, tokenizer in loaded.items()}
    rounds: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats + 1):  # the first writes what the others read
            for name in NAMES:
                rounds[name].append(of_one(loaded[name], vocabularies[name], folder))
            for s, t in PAIRS:
                rounds[f"{s} {t}"].append(of_pair(vocabularies[s], vocabularies[t], folder))
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    medians = {name: _medians(rows[1:]) for name, rows in rounds.items()}
    _show("tokenizer", {name: medians[name] for name in NAMES})
    _show("student teacher", {name: row for name, row in medians.items() if name not in NAMES})
    print(f"kept: {size / 2**20:.0f} MiB")
    print(json.dumps(medians))


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {column: statistics.median(row[column] for row in rows) for column in rows[0]}


if __name__ == "__main__":
    main()
