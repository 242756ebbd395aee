"""What is kept on disk is what would be built, for these very vocabularies, or it is not used."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import support.tokenizers_zoo as zoo
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from diglot.vocabulary import Vocabulary, cache
from diglot.vocabulary.maps import greedy_tokens, shared_prefix_cells

Ints = NDArray[np.int64]
OTHER = Vocabulary.from_tokenizer(zoo.inst())


@pytest.fixture(autouse=True)
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of tables, in which those of small vocabularies are kept too."""
    monkeypatch.setattr(cache, "LEAST", 0)
    monkeypatch.setenv("DIGLOT_TABLES", str(tmp_path / "tables"))
    cache._say.cache_clear()
    cache._say_unwritable.cache_clear()
    yield tmp_path / "tables"


def fresh(name: str = "chatml", rows: int | None = None) -> Vocabulary:
    return Vocabulary.from_tokenizer(zoo.ALL[name](), rows)


def changed(change: Callable[[PreTrainedTokenizerFast], object], **special: str) -> Vocabulary:
    backend = Tokenizer.from_str(zoo.chatml().backend_tokenizer.to_str())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", **special}
    )
    change(tokenizer)
    return Vocabulary.from_tokenizer(tokenizer)


def everything(vocabulary: Vocabulary) -> dict[str, Ints]:
    """All that may be kept about a vocabulary and its pair with another."""
    trie, cells = vocabulary.trie, shared_prefix_cells(vocabulary, OTHER)
    results = {name: getattr(trie, name) for name in ("sorted_ids", "low", "high", "token", "node_at", "edges")}
    results |= dict(zip(("shared_s", "shared_t"), vocabulary.shared(OTHER), strict=True))
    results |= {"there": greedy_tokens(vocabulary, OTHER), "back": greedy_tokens(OTHER, vocabulary)}
    return results | {"cells_s": cells.student, "cells_t": cells.teacher, "count": np.array([cells.count])}


def equal(one: Mapping[str, Ints], other: Mapping[str, Ints]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name]) for name in one
    )


def entry(folder: Path, kind: str = "trie") -> Path:
    (path,) = folder.glob(f"{kind}-*.safetensors")
    return path


@pytest.mark.parametrize("name", zoo.ALL)
def test_what_is_kept_is_what_is_built(name: str, tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIGLOT_TABLES", "off")
    built = everything(fresh(name))
    assert not tables.exists()
    monkeypatch.setenv("DIGLOT_TABLES", str(tables))
    assert equal(everything(fresh(name)), built)
    files = {path: path.stat().st_mtime_ns for path in tables.iterdir()}
    assert {path.name.split("-")[0] for path in files} == {"trie", "shared", "greedy", "cells"}
    for method in ("of", "longest"):
        monkeypatch.setattr(f"diglot.vocabulary.trie.ByteTrie.{method}", lambda *_: pytest.fail("built, though kept"))
    expected = everything(fresh(name))
    assert equal(expected, built) and all(array.flags.writeable for array in expected.values())
    assert {path: path.stat().st_mtime_ns for path in tables.iterdir()} == files


CHANGES: dict[str, Callable[[], Vocabulary]] = {
    "one added token": lambda: changed(lambda t: t.add_tokens(["<note>"])),
    "one added token, another": lambda: changed(lambda t: t.add_tokens(["<nota>"])),
    "one added special token": lambda: changed(
        lambda t: t.add_special_tokens({"additional_special_tokens": ["<note>"]})
    ),
    "another special id": lambda: changed(lambda t: None, unk_token="the"),
    "a larger embedding": lambda: fresh("chatml", 512),
    "a much larger one": lambda: fresh("chatml", 513),
}


@pytest.mark.parametrize("first", [None, *CHANGES])
@pytest.mark.parametrize("then", CHANGES)
def test_a_changed_tokenizer_is_never_served_the_tables_of_the_old_one(
    first: str | None, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything(CHANGES[first]() if first else fresh())
    state = everything(CHANGES[then]())
    monkeypatch.setenv("DIGLOT_TABLES", "off")
    assert equal(state, everything(CHANGES[then]()))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))


def _foreign(path: Path) -> None:
    path.write_bytes(safetensors.numpy.save({"low": np.zeros(3, np.int64)}))


def _text(path: Path) -> None:
    path.write_text("not a table at all, but longer than eight bytes")


def _other_record(path: Path, **replaced: object) -> None:
    """Whole, with a right checksum, and about something else."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    record = {**json.loads(header["__metadata__"]["diglot"]), **replaced}
    path.write_bytes(safetensors.numpy.save(safetensors.numpy.load(raw), {"diglot": json.dumps(record)}))


def _of_another(path: Path) -> None:
    _other_record(path, of=[["0" * 64, 420]])


def _by_other_code(path: Path) -> None:
    _other_record(path, code="0" * 64)


def _no_record(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(safetensors.numpy.save(safetensors.numpy.load(raw), {"diglot": "[]"}))


def _renamed(path: Path) -> None:
    """The arrays under each other's names."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    arrays = safetensors.numpy.load(raw)
    arrays["low"], arrays["high"] = arrays["high"], arrays["low"]
    path.write_bytes(safetensors.numpy.save(arrays, header["__metadata__"]))


DAMAGES = [_truncate, _empty, _flip, _foreign, _text, _of_another, _by_other_code, _no_record, _renamed]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_entry_is_said_once_and_built_anew(
    damage: Callable[[Path], None], tables: Path, caplog: pytest.LogCaptureFixture
) -> None:
    built = everything(fresh())
    path = next(p for p in tables.glob("trie-*") if _is_of(p, fresh()))
    whole = path.read_bytes()
    damage(path)
    with caplog.at_level(logging.INFO, logger="diglot"):
        assert equal(everything(fresh()), built)
        damage(path)
        assert equal(everything(fresh()), built)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1 and str(path) in messages[0] and "built anew" in messages[0]
    assert path.read_bytes() == whole


def _is_of(path: Path, vocabulary: Vocabulary) -> bool:
    return vocabulary.content_hash.encode() in path.read_bytes()


def test_an_entry_under_the_name_of_another_is_not_taken_for_it(tables: Path) -> None:
    _ = fresh("chatml").trie
    one = entry(tables)
    _ = fresh("turns").trie
    (other,) = set(tables.iterdir()) - {one}
    os.replace(other, one)
    expected = fresh("chatml").trie
    assert np.array_equal(expected.low, type(expected).of(fresh("chatml")).low)


def test_other_code_builds_anew(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _ = fresh().trie
    before = entry(tables).read_bytes()
    monkeypatch.setattr(cache, "_code", lambda: "a change in how tries are built")
    _ = fresh().trie
    assert entry(tables).read_bytes() != before


def test_every_source_of_the_package_counts_as_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So nobody can change how a table is built and be served the one of before."""
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "cache.py"))
    results = {cache._code.__wrapped__()}
    for name in ("cache.py", "trie.py", "maps.py"):
        (tmp_path / name).write_text("a")
        results.add(cache._code.__wrapped__())
        (tmp_path / name).write_text("b")
        results.add(cache._code.__wrapped__())
    assert len(results) == 7 and "" in results


WRITER = """
import sys
import numpy as np
from pathlib import Path
from diglot.vocabulary import cache
path, arrays = Path(sys.argv[1]), {"low": np.arange(200_000), "high": np.arange(7)}
print("ready", flush=True)
sys.stdin.readline()
for _ in range(60):
    cache._write(path, arrays, {"kind": "race"})
    entry = cache._read(path, {"kind": "race"})
    assert entry is not None and all(np.array_equal(entry[name], arrays[name]) for name in arrays)
"""


def test_processes_that_write_at_once_never_see_half_an_entry(tables: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tables / "race.safetensors")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    writers = [subprocess.Popen(command, env=environment, text=True, **pipes) for _ in range(2)]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    errors = [writer.communicate(timeout=120)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], errors
    assert "built anew" not in "".join(errors)
    assert [path.name for path in tables.iterdir()] == ["race.safetensors"]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for root, who may write everywhere: a file stands where the folder should be."""
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere"):
        monkeypatch.setenv("DIGLOT_TABLES", str(place))
        assert fresh().trie.low[0] == 0
    assert (tmp_path / "file").read_text() == ""


def test_a_read_only_folder_is_read_and_not_written(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables.mkdir()
    _ = fresh().trie
    before = sorted(tables.iterdir())

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    # As a read-only file system answers; root would be allowed to write whatever the mode of the folder says.
    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    assert fresh().trie.low[0] == 0 and sorted(tables.iterdir()) == before
    for path in before:
        path.unlink()
    assert fresh().trie.low[0] == 0 and not list(tables.iterdir())


def test_a_full_disk_leaves_no_half_entry(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert fresh().trie.low[0] == 0 and not list(tables.iterdir())


def test_a_missing_home_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIGLOT_TABLES")
    monkeypatch.delenv("DIGLOT_CACHE", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as it does where nobody has a home
    assert cache.folder() is None and fresh().trie.low[0] == 0


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, "home/.cache/diglot/tables"),
        ({"DIGLOT_CACHE": "here"}, "here/tables"),
        ({"DIGLOT_CACHE": "here", "DIGLOT_TABLES": "there"}, "there"),
        ({"DIGLOT_CACHE": "off"}, None),
        ({"DIGLOT_CACHE": "here", "DIGLOT_TABLES": "off"}, None),
    ],
)
def test_where_tables_are_kept(variables: dict[str, str], place: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DIGLOT_CACHE", "DIGLOT_TABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "home")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache.folder() == (place and Path(place))


def test_small_vocabularies_are_not_kept(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    _ = fresh().trie
    assert not tables.exists()


@given(
    arrays=st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda s: s != "__metadata__"),
        npst.arrays(np.int64, npst.array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=9)),
        max_size=4,
    )
)
def test_a_round_trip_loses_nothing(arrays: dict[str, Ints], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("tables") / "x.safetensors"
    cache._write(path, arrays, {"kind": "x"})
    result = cache._read(path, {"kind": "x"})
    assert result is not None and equal(result, arrays)
