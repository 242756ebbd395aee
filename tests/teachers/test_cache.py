"""The teacher cache: the same run to the bit, nothing stale, nothing damaged, and no more disk than allowed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
import torch
from support import tiny
from torch import Tensor

from diglot.batches import PackedSide, pack
from diglot.rendering import Conversation, Renderer
from diglot.teachers import CachedTeacher, LocalTeacher
from diglot.trainers import GKDTrainer


def teacher(seed: int = 1, **config: Any) -> LocalTeacher:
    return LocalTeacher(tiny.tiny_model(zoo.inst(), seed, **config), Renderer(zoo.inst(), name="teacher"))


def side(of: LocalTeacher, *texts: str) -> PackedSide:
    read = [of.renderer.render(Conversation(None, f"Say {i % 3}:"), text) for i, text in enumerate(texts)]
    return pack(read, [1] * len(read), of.renderer.stop_id)


TEXTS = ("hello", "one two three, as you asked", "naïve café", "x = 1")


class Asked:
    """Counts the rows that the teacher reads."""

    def __init__(self, of: LocalTeacher) -> None:
        self.rows = 0
        of.model.model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: Any, args: Any, kwargs: Any) -> None:
        self.rows += len(kwargs["input_ids"])


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_what_was_asked_is_found_again_to_the_bit_and_only_the_rest_is_asked(tmp_path: Path) -> None:
    local = teacher()
    whole = side(local, *TEXTS)
    expected = local.hidden(whole)
    cached = CachedTeacher(local, tmp_path)
    assert torch.equal(cached.hidden(whole), expected) and cached.take_counts() == (0, 4)
    files(tmp_path)[0].unlink()
    counting = Asked(local)
    again = CachedTeacher(local, tmp_path)
    assert torch.equal(again.hidden(whole), expected) and again.take_counts() == (3, 1)
    assert counting.rows == 1
    assert torch.equal(again.hidden(whole), expected) and counting.rows == 1


def runs(tmp_path: Path, cache: Path | None, **options: Any) -> tuple[GKDTrainer, list[dict[str, Any]], int]:
    """Three epochs, shuffled, on and off policy; the log without times and counts, and the teacher's rows read."""
    trainer = tiny.gkd(
        tmp_path,
        zoo.chatml(),
        zoo.turns(),
        objective="strict",  # `covering` asks the teacher anew for texts with branches
        teacher_cache_dir=None if cache is None else str(cache),
        num_train_epochs=3,
        max_steps=-1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **options,
    )
    counting = Asked(trainer.comparisons[0].teacher)
    trainer.train()
    log = [
        {k: v for k, v in entry.items() if not k.startswith(("train_", "teacher/"))}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return trainer, log, counting.rows


@pytest.mark.parametrize("lmbda", [0.0, 0.5])
def test_a_run_with_the_cache_is_the_run_without_it_to_the_bit(tmp_path: Path, lmbda: float) -> None:
    """A cold run, one that finds everything, and one on what another order of the data has left."""
    plain, expected, rows = runs(tmp_path / "plain", None, lmbda=lmbda)
    runs(tmp_path / "other", tmp_path / "cache", lmbda=lmbda, seed=7)
    for name in ("cold", "warm"):
        trainer, log, finished = runs(tmp_path / name, tmp_path / "cache", lmbda=lmbda)
        assert log == expected
        for p, q in zip(plain.model.parameters(), trainer.model.parameters(), strict=True):
            assert torch.equal(p, q)
        counts = [
            (entry["teacher/cache_hits"], entry["teacher/cache_misses"])
            for entry in trainer.state.log_history
            if "teacher/cache_hits" in entry
        ]
        assert sum(hits for hits, _ in counts) > 0 and finished < rows
        if name == "warm":
            assert all(misses == 0 for _, misses in counts)
            if lmbda == 0:
                assert finished == 0


def test_prompts_that_are_read_once_keep_their_bits(tmp_path: Path) -> None:
    """Shared prompts make the sums of a row depend on its batch: such batches are found as a whole or not at all."""
    local = teacher()
    read = [local.renderer.render(Conversation(None, "Say one and two and three:" * 2), t) for t in ("a", "b c", "d")]
    batch = pack(read, [1] * 3, local.renderer.stop_id)
    expected, cached = local.hidden(batch), CachedTeacher(local, tmp_path)
    assert cached._depends_on_batch(batch)
    assert torch.equal(cached.hidden(batch), expected)
    files(tmp_path)[1].unlink()
    assert torch.equal(cached.hidden(batch), expected)
    alone = pack(read[:1], [1], local.renderer.stop_id)
    cached.take_counts()
    assert torch.equal(cached.hidden(alone), local.hidden(alone)) and cached.take_counts() == (0, 1)


def test_samples_are_not_kept(tmp_path: Path) -> None:
    runs(tmp_path / "a", tmp_path / "cache", lmbda=0.999)  # no step of these draws the data
    assert not files(tmp_path / "cache")


def damage(path: Path, how: str) -> None:
    raw = bytearray(path.read_bytes())
    if how == "flipped bit":
        raw[-5] ^= 4
    path.write_bytes({"cut": raw[:-9], "empty": b"", "noise": os.urandom(200), "flipped bit": raw}[how])


@pytest.mark.parametrize("how", ["flipped bit", "cut", "empty", "noise"])
def test_damaged_files_are_asked_again_and_mended(tmp_path: Path, how: str) -> None:
    local = teacher()
    whole, cached = side(local, *TEXTS), CachedTeacher(local, tmp_path)
    expected = cached.hidden(whole)
    for path in files(tmp_path)[:2]:
        damage(path, how)
    cached.take_counts()
    assert torch.equal(cached.hidden(whole), expected) and cached.take_counts() == (2, 2)
    assert torch.equal(cached.hidden(whole), expected) and cached.take_counts() == (4, 0)


def test_another_teacher_text_or_tokenizer_is_not_found(tmp_path: Path) -> None:
    local = teacher()
    whole = side(local, *TEXTS)
    CachedTeacher(local, tmp_path).hidden(whole)

    def hits(other: LocalTeacher, batch: PackedSide) -> int:
        cached = CachedTeacher(other, tmp_path)
        cached.hidden(batch)
        return cached.take_counts()[0]

    assert hits(teacher(), whole) == 4  # the same weights, loaded again
    assert hits(teacher(2), whole) == 0
    assert hits(teacher(rope_parameters={"rope_type": "default", "rope_theta": 777.0}), whole) == 0
    other = teacher()
    other.renderer = Renderer(zoo.turns(), name="teacher")
    assert hits(other, whole) == 0
    longer = side(local, *TEXTS[:3], "x = 12")
    assert hits(local, longer) == 3


def test_weights_that_are_written_to_are_another_teacher_from_then_on(tmp_path: Path) -> None:
    """One number of one matrix, in place."""
    local = teacher()
    whole, cached = side(local, *TEXTS), CachedTeacher(local, tmp_path)
    before = cached.hidden(whole)
    with torch.no_grad():
        local.model.model.layers[1].mlp.up_proj.weight[3, 4] += 0.5
    cached.take_counts()
    after = cached.hidden(whole)
    assert cached.take_counts() == (0, 4)
    assert torch.equal(after, local.hidden(whole)) and not torch.equal(after, before)


def test_the_disk_is_left_its_share(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    local = teacher()
    whole = side(local, *TEXTS)
    full = CachedTeacher(local, tmp_path, keep_free=2**62)
    expected: Tensor = local.hidden(whole)
    for _ in range(2):
        assert torch.equal(full.hidden(whole), expected)
    assert not files(tmp_path) and full.take_counts() == (0, 8)
    assert sum("takes no more" in r.message for r in caplog.records) == 1


def test_a_write_that_fails_leaves_nothing_and_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    local = teacher()
    monkeypatch.setattr(os, "replace", fail)
    whole = side(local, *TEXTS)
    assert torch.equal(CachedTeacher(local, tmp_path).hidden(whole), local.hidden(whole))
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_models_own_number_type_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    local = teacher()
    local.model.to(dtype)
    whole, cached = side(local, *TEXTS), CachedTeacher(local, tmp_path)
    first = cached.hidden(whole)
    second = cached.hidden(whole)
    assert first.dtype == second.dtype == dtype and torch.equal(first, second) and cached.hits == 4
