"""The part of both trainers that must not lose anything: saves, resuming, signals.

A checkpoint is written into a folder beside its place, sealed with a manifest and renamed, so that what is under its
name is whole. A run that gets SIGTERM saves a checkpoint behind the step it is in and stops.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from diglot.errors import CheckpointError, StoppedError
from diglot.trainers import durable
from diglot.trainers.manifest import SHAPING, check_same, versions
from diglot.trainers.secrets import without_secrets

logger = logging.getLogger(__name__)

ARGS_FILE = "training_args.json"
_LOADABLE = ("config.json", "adapter_config.json")  # without one of them a folder is no model


class WholeCheckpoints(Trainer):
    """A `Trainer` whose saves are all or nothing, and which resumes from what is whole and its own only."""

    _beside: Path | None = None  # where a checkpoint is being written
    _identity: dict[str, Any] | None = None

    # ---- what a subclass says --------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with: `student`, `teacher` and `objective`, each a mapping of plain values."""
        raise NotImplementedError

    def save_extras(self, folder: Path) -> None:
        """Write into a checkpoint what the Trainer does not keep itself; on every rank."""

    # ---- saving ----------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        """Where checkpoints go: beside their place while one is being written."""
        return str(self._beside) if self._beside is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """The Trainer's checkpoint and the extras, as one folder that is whole or not there."""
        run, name = Path(super()._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            durable.tidy(run)
        self.accelerator.wait_for_everyone()
        self._beside = run / f"{durable.BESIDE}{self.state.global_step}"
        made = self._beside / name
        try:
            made.mkdir(parents=True, exist_ok=True)
            self.save_extras(made)
            super()._save_checkpoint(model, trial)
        finally:
            self._beside = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._name_best(made, run / name)
            durable.seal(made, {"step": self.state.global_step, **self.described()})
            durable.place(made, run / name)
            shutil.rmtree(made.parent, ignore_errors=True)
            rotate(run, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(run / name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not before the checkpoint is in its place."""

    def _name_best(self, made: Path, target: Path) -> None:
        """If this is the best checkpoint so far, the state must name the place where it will be."""
        if self.state.best_model_checkpoint == str(made):
            self.state.best_model_checkpoint = str(target)
            self.state.save_to_json(str(made / TRAINER_STATE_NAME))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student so that the folder does not load before all of it is there."""
        if _internal_call:
            return super().save_model(output_dir, _internal_call=True)
        target = Path(str(output_dir or self.args.output_dir))
        beside = target / f"{durable.BESIDE}model"
        if self.args.should_save:
            shutil.rmtree(beside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        super().save_model(str(beside), _internal_call=True)
        self.accelerator.wait_for_everyone()
        if self.args.should_save and beside.is_dir():
            durable.move_files(beside, target, last=_LOADABLE)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The Trainer's own, with the options as JSON instead of a pickle."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(str(output_dir or self.args.output_dir))
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            text = json.dumps(without_secrets(self.args.to_dict()), indent=1, sort_keys=True, default=str)
            (folder / ARGS_FILE).write_text(text + "\n", encoding="utf-8")

    def described(self) -> dict[str, Any]:
        """All that the manifest says about the run besides its files."""
        shaping = {name: getattr(self.args, name) for name in SHAPING if hasattr(self.args, name)}
        world = {"processes": self.args.world_size, "device": self.args.device.type}
        if self._identity is None:  # once, before training: the Trainer itself changes configurations when it starts
            self._identity = self.identity()
        about = {**self._identity, "options": shaping, "versions": versions(), "world": world}
        return json.loads(json.dumps(about, default=str))

    # ---- resuming --------------------------------------------------------------------------------------------

    def find_checkpoint(self, resume: str | bool | None) -> str | None:
        """The folder to resume from, whole, undamaged and of this run; None to start anew.

        Raises:
            CheckpointError: no whole checkpoint, a damaged one, or one of another run; says what differs.
        """
        if resume is None or resume is False:
            return None
        run = Path(str(self.args.output_dir))
        if self.args.should_save:
            durable.tidy(run)
        self.accelerator.wait_for_everyone()
        chosen = last_whole(run) if resume is True else Path(str(resume))
        read = durable.verify if self.args.should_save else durable.read_manifest
        check_same(read(chosen), self.described(), chosen)
        return str(chosen)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; resumes from whole checkpoints of this run only, and stops on SIGTERM behind a save.

        Raises:
            CheckpointError: see `find_checkpoint`.
            StoppedError: SIGTERM came; a checkpoint was saved.
        """
        self.described()
        chosen = self.find_checkpoint(resume_from_checkpoint)
        watch = StopOnSignal(self)
        self.add_callback(watch)
        try:
            with watch.listening():
                done = super().train(chosen, *args, **kwargs)
        finally:
            self.remove_callback(watch)
        if watch.stopped:
            step = self.state.global_step
            raise StoppedError(
                f"Stopped by SIGTERM behind step {step}. checkpoint-{step} in {self.args.output_dir} is whole: go on "
                "with --resume_from_checkpoint.",
                128 + signal.SIGTERM,
            )
        return done


class StopOnSignal(TrainerCallback):
    """Ends training behind the step in which SIGTERM came, on whatever rank, with a checkpoint. A second one kills."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.asked = self.stopped = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM is noted inside; only the main thread can do that."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _note(self, number: int, frame: Any) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = True
        logger.warning("SIGTERM: the run saves a checkpoint behind this step and stops. Once more kills it.")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ask for a checkpoint and for the end."""
        if any_rank(self.trainer, self.asked):
            self.stopped = control.should_save = control.should_training_stop = True
        return control


def any_rank(trainer: Trainer, flag: bool) -> bool:
    """Is `flag` set on any rank? One small reduction where there are several."""
    if trainer.accelerator.num_processes == 1:
        return flag
    given = torch.tensor(float(flag), device=trainer.accelerator.device)
    return bool(trainer.accelerator.reduce(given, "sum").item())


def last_whole(run: Path) -> Path:
    """The whole checkpoint of `run` with the highest step; those that are not whole are named and passed over.

    Raises:
        CheckpointError: there is none.
    """
    for step, folder in sorted(_checkpoints(run), reverse=True):
        why = durable.problem(folder)
        if why is None:
            return folder
        logger.warning("checkpoint-%d is passed over: %s", step, why)
    raise CheckpointError(f"There is no whole checkpoint in {run}. Start anew, without resume_from_checkpoint.")


def rotate(run: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest whole checkpoints beyond `limit`; never the newest, never the best."""
    if not limit or limit <= 0:
        return
    whole = [(durable.age(f), step, f) for step, f in _checkpoints(run) if durable.problem(f) is None]
    ordered = [folder for _, _, folder in sorted(whole)]
    kept = {*ordered[-1:], *(f for f in ordered if best and f == Path(best))}
    spare = [folder for folder in ordered if folder not in kept]
    for folder in spare[: max(len(ordered) - max(limit, len(kept)), 0)]:
        durable.remove(folder)


def _checkpoints(run: Path) -> list[tuple[int, Path]]:
    found = run.glob("checkpoint-*") if run.is_dir() else ()
    return [(int(n), f) for f in found if f.is_dir() and (n := f.name.removeprefix("checkpoint-")).isdigit()]
