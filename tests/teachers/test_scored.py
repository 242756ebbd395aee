"""`diglot score`: what is kept is what the teacher says; a kill costs one shard; nothing stale or foreign is read."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support.tokenizers_zoo as zoo
import torch
from support import tiny

from diglot.batches import PackedSide, pack
from diglot.cli.main import main
from diglot.data import to_sample
from diglot.errors import DataError, TeacherError
from diglot.rendering import Renderer
from diglot.teachers import LocalTeacher
from diglot.teachers.score_folder import INDEX, REQUEST, is_scores
from diglot.teachers.scored import ScoredTeacher
from diglot.teachers.scoring import Manner, Reading, score_texts

ROWS = tiny.CHAT_ROWS
SAMPLES = [to_sample(row, f"row {i}") for i, row in enumerate(ROWS)]


def teacher(seed: int = 1) -> LocalTeacher:
    model = tiny.tiny_model(zoo.inst(), seed)
    size = model.get_input_embeddings().num_embeddings
    return LocalTeacher(model, Renderer(zoo.inst(), num_embeddings=size, name="teacher"))


def scored(
    of: LocalTeacher, out: Path, level: str = "logprobs", samples: Any = SAMPLES, **manner: Any
) -> ScoredTeacher:
    score_texts(
        of,
        samples,
        out,
        data="rows",
        reading=Reading(),
        manner=Manner(level, **{"batch_size": 2, "shard_texts": 3, "k": 5, **manner}),
        generation_eos=of.model.generation_config.eos_token_id,
    )
    return ScoredTeacher(out)


def side(of: Any, *rows: int) -> PackedSide:
    read = [of.renderer.render(SAMPLES[i].conversation, SAMPLES[i].reply, thinking=False) for i in rows]
    return pack(read, [1] * len(read), of.renderer.stop_id)


def test_log_probs_and_likeliest_ids_are_the_teachers_own(tmp_path: Path) -> None:
    """In another order and other batches than they were scored in."""
    local = teacher()
    stored = scored(local, tmp_path / "s", "top_k")
    batch = side(local, 6, 0, 3)
    answer, rows = stored.ask(batch), local.head(local.hidden(batch)).log_softmax(-1)
    written = rows.gather(-1, batch.targets[:, None])[:, 0]
    stop = rows[:, list(local.renderer.stop_ids)].logsumexp(-1)
    assert torch.allclose(answer.text(False), written, atol=1e-5)
    assert torch.allclose(answer.text(True), torch.where(batch.stop, stop, written), atol=1e-5)
    best = rows.topk(5, -1)
    assert torch.equal(answer.top_ids, best.indices) and torch.allclose(answer.top_logps, best.values, atol=1e-5)


KILLED = """
import os, signal, sys
from diglot.cli.main import main

rename = os.replace
def killed_at_the_third(source, target):
    if str(target).endswith("shard-00002.safetensors"):
        if sys.argv[1] == "after":
            rename(source, target)
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)

os.replace = killed_at_the_third
main(sys.argv[2:])
"""


@pytest.mark.parametrize(("when", "whole"), [("before", 2), ("after", 3)])
def test_a_killed_run_goes_on_and_leaves_the_same_bytes(when: str, whole: int, tmp_path: Path) -> None:
    """SIGKILL around the renaming of the third shard; the second run makes only the missing ones."""
    local = teacher()
    local.model.save_pretrained(tmp_path / "teacher")
    zoo.inst().save_pretrained(tmp_path / "teacher")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 3), encoding="utf-8")
    common = ["--teacher", str(tmp_path / "teacher"), "--data", str(data), "--level", "bytes", "--shard_texts", "2"]
    out = tmp_path / "killed"
    ended = subprocess.run([sys.executable, "-c", KILLED, when, "score", *common, "--out", str(out)], check=False)
    made = {p.name: p.stat().st_mtime_ns for p in out.glob("shard-*.safetensors")}
    assert ended.returncode == -signal.SIGKILL and len(made) == whole and not (out / INDEX).exists()
    assert len(list(out.glob("*.tmp"))) == 3 - whole
    with pytest.raises(TeacherError, match="not finished"):
        ScoredTeacher(out)
    assert main(["score", *common, "--out", str(out)]) == 0
    assert main(["score", *common, "--out", str(tmp_path / "whole")]) == 0
    assert all((out / name).stat().st_mtime_ns == then for name, then in made.items())
    files = {p.relative_to(out) for p in out.rglob("*") if p.is_file()}
    assert files == {p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*") if p.is_file()}
    assert all((out / f).read_bytes() == (tmp_path / "whole" / f).read_bytes() for f in files) and len(files) >= 13


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(seed=2), "weights"),
        (dict(samples=SAMPLES[:5]), "texts number: 8 there, 5 here"),
        (dict(level="bytes"), "level: 'logprobs' there, 'bytes' here"),
        (dict(shard_texts=4), "shard_texts"),
    ],
)
def test_a_folder_of_another_request_is_not_gone_on_with(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    scored(teacher(), tmp_path / "s")
    with pytest.raises(TeacherError, match=message):
        scored(teacher(change.pop("seed", 1)), tmp_path / "s", **change)


def test_what_differs_from_the_scores_is_said(tmp_path: Path) -> None:
    scored(teacher(), tmp_path / "s")
    folder = tmp_path / "s"
    with pytest.raises(TeacherError, match="another tokenizer"):
        ScoredTeacher(folder, zoo.turns())
    with pytest.raises(TeacherError, match="score_turns: 'last' there, 'all' here"):
        ScoredTeacher(folder, options={"score_turns": "all"})
    with pytest.raises(TeacherError, match="markers: 'read' there, 'text' here"):
        ScoredTeacher(folder, options={"markers": "text", "fold_system": False})
    # One of its own: the zoo's tokenizers are made once for all tests of a process.
    changed = zoo._wrap(zoo.inst().backend_tokenizer, zoo.INST + " ", bos_token="<s>", eos_token="</s>")
    with pytest.raises(TeacherError, match="template"):
        ScoredTeacher(folder, changed)


def test_a_text_that_was_not_scored_is_an_error_that_shows_it(tmp_path: Path) -> None:
    stored = scored(teacher(), tmp_path / "s", samples=SAMPLES[:5])
    with pytest.raises(TeacherError, match=r"1 of 2 texts .* naïve|1 of 2 texts"):
        stored.ask(side(stored, 0, 6))


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_damage_is_found(tmp_path: Path, how: str) -> None:
    scored(teacher(), tmp_path / "s", "bytes")
    path = tmp_path / "s" / "shard-00000.safetensors"
    raw = bytearray(path.read_bytes())
    start = (
        8
        + int.from_bytes(raw[:8], "little")
        + json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["logps"]["data_offsets"][0]
    )
    raw[start] ^= 1
    path.unlink()
    if how != "gone":
        path.write_bytes(raw[:-7] if how == "cut" else raw)
    with pytest.raises(TeacherError, match=r"damaged|has .* bytes"):
        stored = ScoredTeacher(tmp_path / "s")
        stored.ask(side(stored, 0))


def test_rows_without_replies_and_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no reply"):
        scored(teacher(), tmp_path / "a", samples=[to_sample(tiny.PROMPT_ROWS[0], "row 0")])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("x")
    with pytest.raises(TeacherError, match="not empty"):
        scored(teacher(), tmp_path / "b")


def test_the_index_says_what_a_token_costs(tmp_path: Path) -> None:
    costs = {}
    for level in ("logprobs", "top_k", "bytes"):
        folder = scored(teacher(), tmp_path / level, level).folder
        costs[level] = folder.index["bytes_per_token"]
        sizes = sum(p.stat().st_size for p in (tmp_path / level).glob("shard-*"))
        assert folder.index["bytes"] == sizes and costs[level] == pytest.approx(sizes / folder.index["tokens"], abs=0.1)
        assert json.loads((tmp_path / level / REQUEST).read_text())["level"] == level and is_scores(tmp_path / level)
    assert costs["logprobs"] < costs["top_k"] < costs["bytes"]


def test_kept_distributions_are_distributions(tmp_path: Path) -> None:
    """One for each byte and the stop of a text that the teacher's tokens spell out."""
    local = teacher()
    stored = scored(local, tmp_path / "s", "bytes")
    batch = side(local, 1, 4)
    answer = stored.ask(batch)
    for segment, row in ((0, 1), (1, 4)):
        length = len(str(SAMPLES[row].reply).encode()) + 1
        places = torch.arange(length)
        distributions = answer.distributions(torch.full((length,), segment), places)
        assert distributions.shape == (length, 257) and torch.allclose(
            distributions.sum(-1), torch.ones(length), atol=1e-5
        )
        assert distributions[-1, 256] > 0 and np.isfinite(distributions.numpy()).all()
