"""Checkpoints: whole and of this run, or refused with what differs; no keys and no pickles of options on disk."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
import torch
from support import tiny

from diglot.checkpoints import durable, saving
from diglot.checkpoints.manifest import fingerprint
from diglot.errors import CheckpointError, StoppedError
from diglot.options.secrets import is_secret, without_secrets
from diglot.trainers import GKDConfig

SAVES = dict(save_strategy="steps", save_steps=1, max_steps=2, lmbda=0.0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, both saved."""
    out = tmp_path_factory.mktemp("run")
    tiny.gkd(out, zoo.chatml(), zoo.inst(), hub_token="hf_secret", **SAVES).train()
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def resume(out: Path, teacher: Any = None, student: Any = None, **options: Any) -> Any:
    trainer = tiny.gkd(out, student or zoo.chatml(), teacher or zoo.inst(), **{**SAVES, "max_steps": 3, **options})
    trainer.train(resume_from_checkpoint=True)
    return trainer


def test_a_checkpoint_says_what_it_is_of(run: Path) -> None:
    manifest = durable.verify(run / "checkpoint-2")
    files = {str(p.relative_to(run / "checkpoint-2")) for p in (run / "checkpoint-2").rglob("*")}
    assert set(manifest["files"]) | {"manifest.json"} == files
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= files
    assert manifest["step"] == 2 and set(manifest["versions"]) == {"diglot", "torch", "transformers"}
    for side, tokenizer in (("student", zoo.chatml()), ("teacher", zoo.inst())):
        assert len(manifest[side]["tokenizer"]) >= 32 and len(manifest[side]["template"]) == 64
        assert manifest[side]["config"]["vocab_size"] == len(tokenizer) and "revision" in manifest[side]
    assert manifest["teacher"]["weights"] and manifest["objective"]["terms"] == [["covering", 1.0]]


def test_a_file_is_hashed_once_when_it_is_saved_and_once_when_it_is_resumed_from(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    plain = durable.sha256

    def watched(path: Path) -> str:
        hashed.append(path)
        return plain(path)

    monkeypatch.setattr(durable, "sha256", watched)
    resume(run, save_total_limit=2)
    names = [(path.parent.name, path.name) for path in hashed]
    assert len(set(names)) == len(names)
    assert {folder for folder, _ in names} == {"checkpoint-2", "checkpoint-3"}


@pytest.mark.parametrize(("options", "message"), [
    ({"teacher": zoo.turns}, "teacher.tokenizer is '.*' in the checkpoint, '.*' now"),
    ({"student": zoo.nfc}, "student.tokenizer is"),
    ({"beta": 1.0}, r"objective.beta is \[0.5\] in the checkpoint, \[1.0\] now"),
    ({"objective": "span"}, r"objective.terms is \[\['covering', 1.0\]\] in the checkpoint, \[\['span', 1.0\]\] now"),
])  # fmt: skip
def test_a_checkpoint_of_another_run_is_refused_and_both_values_are_said(
    options: dict[str, Any], message: str, run: Path
) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    with pytest.raises(CheckpointError, match=message):
        resume(run, **{k: v() if callable(v) else v for k, v in options.items()})
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_another_template_or_other_weights_of_the_teacher_are_refused(run: Path) -> None:
    other = tiny.tiny_model(zoo.inst(), seed=5)
    with pytest.raises(CheckpointError, match=r"teacher\.weights is '\w+' in the checkpoint, '\w+' now"):
        resume(run, models=(tiny.tiny_model(zoo.chatml(), 0), other))
    changed = zoo._wrap(zoo.inst().backend_tokenizer, zoo.INST + " ", bos_token="<s>", eos_token="</s>")
    with pytest.raises(CheckpointError, match=r"teacher\.template is"):
        resume(run, teacher=changed)


def test_other_versions_and_options_are_a_warning_that_says_both_values(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They change the last bit, not what is trained."""
    path = run / "checkpoint-2" / "manifest.json"
    path.write_text(path.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "2.6.0"'))
    resume(run, learning_rate=2e-3)
    assert "versions.torch is '2.6.0' in the checkpoint" in caplog.text
    assert "options.learning_rate is 0.001 in the checkpoint, 0.002 now" in caplog.text


def break_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def break_size(folder: Path) -> None:
    with (folder / "optimizer.pt").open("ab") as file:
        file.write(b"x")


def break_file(folder: Path) -> None:
    (folder / "rng_state.pth").unlink()


def break_json(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"files": {"a": 3}}')


@pytest.mark.parametrize("broken", [break_manifest, break_size, break_file, break_json])
def test_what_is_not_whole_is_passed_over_and_refused_by_name(
    broken: Callable[[Path], None], run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken(run / "checkpoint-2")
    trainer = tiny.gkd(run, zoo.chatml(), zoo.inst(), **SAVES)
    assert trainer.checkpoints.find(True) == str(run / "checkpoint-1") and "checkpoint-2 is skipped" in caplog.text
    with pytest.raises(CheckpointError, match="checkpoint-2"):
        trainer.checkpoints.find(str(run / "checkpoint-2"))


def test_a_damaged_byte_is_found(run: Path) -> None:
    path = run / "checkpoint-2" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged: its SHA-256 is"):
        resume(run)


@pytest.mark.parametrize("where", ["/etc/passwd", "../../outside", "link"])
def test_a_manifest_cannot_point_outside_of_its_folder(where: str, run: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("secret")
    folder = run / "checkpoint-2"
    (folder / "link").symlink_to(tmp_path / "outside")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][where] = {"size": 6, "sha256": "0"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="outside of its folder"):
        durable.verify(folder)


def test_a_manifest_is_bounded(run: Path) -> None:
    with (run / "checkpoint-2" / "manifest.json").open("wb") as file:
        file.truncate(1 << 30)  # sparse: takes no disk, would take a gigabyte of memory
    with pytest.raises(CheckpointError, match="larger than"):
        durable.read_manifest(run / "checkpoint-2")


def test_no_key_reaches_the_disk(run: Path) -> None:
    """Neither the hub's token nor one among the arguments for models, in no file of the run."""
    files = [p for p in run.rglob("*") if p.is_file()]
    assert files and not any(b"hf_secret" in p.read_bytes() for p in files)
    assert not list(run.rglob("training_args.bin"))
    args = GKDConfig(
        str(run), hub_token="hf_secret", teacher_model_init_kwargs={"token": "hf_secret", "a": 1}, use_cpu=True
    )
    stream = io.BytesIO()
    torch.save(args, stream)
    assert b"hf_secret" not in stream.getvalue() and b"hf_secret" not in pickle.dumps(args)
    assert args.hub_token == "hf_secret"


@pytest.mark.parametrize(("name", "secret"), [
    ("hub_token", True), ("token", True), ("teacher_api_key", True), ("api-key", True), ("Authorization", True),
    ("max_new_tokens", False), ("num_tokens", False), ("token_ids", False), ("monkey", False),
])  # fmt: skip
def test_keys_are_known_by_their_names(name: str, secret: bool) -> None:
    assert is_secret(name) == secret
    assert (name in without_secrets({"a": [{name: "x"}]})["a"][0]) != secret


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_in_a_checkpoint_does_not_run(name: str, run: Path, tmp_path: Path) -> None:
    """Even in a checkpoint whose manifest agrees with it."""
    folder, mark = run / "checkpoint-2", tmp_path / "ran"
    torch.save({"bomb": _Bomb(mark)}, folder / name)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").unlink()
    durable.seal(folder, {k: v for k, v in manifest.items() if k not in ("files", "format")})
    with pytest.raises(pickle.UnpicklingError, match="Weights only"):
        resume(run)
    assert not mark.exists()


def test_old_checkpoints_go_but_never_the_newest_nor_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        durable.seal(tmp_path / f"checkpoint-{step}", {"step": step})
    (tmp_path / "checkpoint-9").mkdir()  # not whole: not ours to remove, and no reason to remove another
    saving.rotate(tmp_path, 2, best=str(tmp_path / "checkpoint-2"))
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4", "checkpoint-9"}
    saving.rotate(tmp_path, 1, best=str(tmp_path / "checkpoint-2"))
    assert saving.last_whole(tmp_path).name == "checkpoint-4" and (tmp_path / "checkpoint-2").exists()


def test_the_best_checkpoint_is_named_by_its_own_place(tmp_path: Path) -> None:
    from datasets import Dataset

    trainer = tiny.gkd(
        tmp_path, zoo.chatml(), zoo.inst(), **SAVES, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="bits_per_byte", greater_is_better=False,
        keywords={"eval_dataset": Dataset.from_list(tiny.CHAT_ROWS[:2])},
    )  # fmt: skip
    trainer.train()
    best = Path(str(trainer.state.best_model_checkpoint))
    assert best.parent == tmp_path and durable.problem(best) is None
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)


def test_a_folder_is_no_model_before_all_of_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny.gkd(tmp_path / "run", zoo.chatml(), zoo.inst())
    trainer.save_model(str(tmp_path / "student"))
    seen: list[bool] = []
    real = os.replace

    def watched(source: Any, target: Any) -> None:
        seen.append((tmp_path / "student" / "config.json").exists())
        real(source, target)

    monkeypatch.setattr(durable.os, "replace", watched)
    trainer.save_model(str(tmp_path / "student"))
    names = {p.name for p in (tmp_path / "student").iterdir()}
    assert len(seen) > 3 and not any(seen) and {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any(name.startswith(".") for name in names)


def test_a_fingerprint_of_a_large_embedding_stays_inside_of_it() -> None:
    """Of so many values the index of the last one has no float32; a view takes no memory."""
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.ones(1).expand(16_777_220), requires_grad=False)
    assert fingerprint(model) is not None


def test_fingerprints_tell_weights_apart() -> None:
    models = [tiny.tiny_model(zoo.inst(), seed) for seed in (0, 0, 1)]
    results = [fingerprint(m) for m in models]
    assert results[0] == results[1] != results[2]


def test_a_signal_ends_the_run_with_a_message_that_says_how_to_go_on(tmp_path: Path) -> None:
    import signal

    from transformers import TrainerCallback

    class Send(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    options = {**SAVES, "save_strategy": "no", "max_steps": 5}
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), **options, keywords={"callbacks": [Send()]})
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(
        StoppedError, match=r"after step 2\. checkpoint-2 in .* is complete\. Continue with --resume"
    ) as error:
        trainer.train()
    assert error.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    assert saving.last_whole(tmp_path).name == "checkpoint-2"


def counted(real: Callable[..., Any], nth: int, calls: list[str]) -> Callable[..., Any]:
    """`real`, whose `nth` call of all that are counted fails."""

    def call(*arguments: Any, **named: Any) -> Any:
        calls.append(real.__name__)
        if len(calls) == nth:
            raise OSError("the disk is full")
        return real(*arguments, **named)

    return call


@pytest.mark.parametrize("there", [False, True])
def test_an_error_in_any_call_of_a_save_leaves_the_old_folder_or_the_new(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tests/support/kills.py does the same with a trainer's own saves and processes that end."""
    seen: set[str] = set()
    for nth in range(1, 100):
        run = tmp_path / str(nth)
        made, target = run / ".saving-1" / "checkpoint-1", run / "checkpoint-1"
        for folder, text in ((made, "new"), *([(target, "old")] if there else [])):
            folder.mkdir(parents=True)
            (folder / "a").write_text(text)
        if there:
            durable.seal(target, {})
        calls: list[str] = []
        with monkeypatch.context() as patch:
            for name in ("rename", "fsync", "open"):
                patch.setattr(durable.os, name, counted(getattr(os, name), nth, calls))
            try:
                durable.seal(made, {})
                durable.place(made, target)
                seen.add("done")
            except OSError:
                pass
        durable.tidy(run)
        seen.add((target / "a").read_text() if target.exists() else "none")
        assert not target.exists() or durable.verify(target)
        assert [p.name for p in run.iterdir()] == (["checkpoint-1"] if target.exists() else [])
        if "done" in seen:
            break
    assert nth > 5 and seen == {"done", "new", "old" if there else "none"}


@pytest.mark.parametrize("what", ["checkpoint", "model"])
def test_a_save_for_which_there_is_no_room_leaves_nothing_behind(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), save_strategy="steps", save_steps=1)
    full = counted(trainer._save, 2 if what == "checkpoint" else 3, [])
    monkeypatch.setattr(trainer, "_save", full)
    with pytest.raises(OSError, match="the disk is full"):
        trainer.train()
        trainer.save_model()
    assert not list(tmp_path.glob(".saving-*"))
    assert saving.last_whole(tmp_path).name == ("checkpoint-1" if what == "checkpoint" else "checkpoint-2")
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_what_a_killed_save_left_is_gone_at_the_next_start(resume: bool, tmp_path: Path) -> None:
    if resume:
        tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), max_steps=1, save_strategy="steps").train()
    left = tmp_path / ".saving-7" / "checkpoint-7"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half of")
    tiny.gkd(tmp_path, zoo.chatml(), zoo.inst()).train(resume_from_checkpoint=resume)
    assert not left.parent.exists()


def test_what_another_process_is_writing_stays_and_is_not_written_into(tmp_path: Path) -> None:
    text = "import sys, pathlib; from diglot.checkpoints import durable\n"
    text += "with durable.writing(pathlib.Path(sys.argv[1])): print(flush=True); input()"
    beside = tmp_path / ".saving-1"
    with subprocess.Popen(
        [sys.executable, "-c", text, str(beside)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None and writer.stdout.readline()
        durable.tidy(tmp_path)
        assert beside.exists()
        with pytest.raises(CheckpointError, match="Another process is saving"), durable.writing(beside):
            pass
        writer.kill()  # and what it held is free
    durable.tidy(tmp_path)
    assert not beside.exists()
