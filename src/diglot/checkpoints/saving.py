"""Checkpoints that are all or nothing, and resuming from what is whole and the run's own only.

A checkpoint is written into a folder beside its place, sealed with a manifest and renamed, so that what is under its
name is whole.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from diglot.checkpoints import durable
from diglot.checkpoints.manifest import check_same, run_facts
from diglot.errors import CheckpointError, StoppedError
from diglot.options.secrets import without_secrets

logger = logging.getLogger(__name__)

ARGS_FILE = "training_args.json"
_LOADABLE = ("config.json", "adapter_config.json")  # without one of them a folder is no model


class Verified(str):
    """The path of a checkpoint whose files and whose run `Checkpoints.find` has compared."""


class Checkpoints:
    """Where a run saves, and what it resumes from. All processes call each method at the same step."""

    def __init__(
        self, accelerator: Accelerator, args: TrainingArguments, identity: Callable[[], dict[str, Any]]
    ) -> None:
        self.accelerator, self.args, self._identify = accelerator, args, identity
        self.beside: Path | None = None  # where a checkpoint is being written
        self._identity: dict[str, Any] | None = None

    def described(self) -> dict[str, Any]:
        """All that a manifest says about the run besides its files."""
        if self._identity is None:  # once, before training: the Trainer itself changes configurations when it starts
            self._identity = self._identify()
        plain: dict[str, Any] = json.loads(json.dumps({**self._identity, **run_facts(self.args)}, default=str))
        return plain

    @contextlib.contextmanager
    def saving(self, run: Path, state: TrainerState) -> Iterator[Path]:
        """A folder that becomes checkpoint `state.global_step` of `run` when the block has ended well."""
        step, main = state.global_step, self.args.should_save
        beside, target = run / f"{durable.BESIDE}{step}", run / f"checkpoint-{step}"
        made = beside / target.name
        with self._writing(run, beside):
            self.beside = beside
            try:
                made.mkdir(parents=True, exist_ok=True)
                yield made
            finally:
                self.beside = None
            self.accelerator.wait_for_everyone()
            if main:
                if state.best_model_checkpoint == str(made):  # the state must name the place where it will be
                    state.best_model_checkpoint = str(target)
                    state.save_to_json(str(made / TRAINER_STATE_NAME))
                durable.seal(made, {"step": step, **self.described()})
                durable.place(made, target)
                shutil.rmtree(beside, ignore_errors=True)
        if main:
            rotate(run, self.args.save_total_limit, state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def _writing(self, run: Path, beside: Path) -> Iterator[None]:
        """`beside`, a folder in `run`, held while the block writes into it; a block that fails leaves nothing there."""
        main = self.args.should_save
        if main:
            durable.tidy(run)
        self.accelerator.wait_for_everyone()
        try:
            with durable.writing(beside) if main else contextlib.nullcontext():
                yield
        except BaseException:
            with contextlib.suppress(OSError):
                if main:
                    durable.tidy(run)
            raise

    def save_model(self, target: Path, save: Callable[[str], None]) -> None:
        """`save` the student into a folder beside `target`, which does not load before all of it is there."""
        beside = target / f"{durable.BESIDE}model"
        with self._writing(target, beside):
            save(str(beside))
            self.accelerator.wait_for_everyone()
            if self.args.should_save and any(beside.iterdir()):
                durable.move_files(beside, target, last=_LOADABLE)

    def find(self, resume: str | bool | None) -> Verified | None:
        """The folder to resume from, whole, undamaged and of this run; None to start anew.

        What this returned is taken as it is, so that a caller can look first and then train.

        Raises:
            CheckpointError: no complete checkpoint, a damaged one, or one of another run; says what differs.
        """
        if isinstance(resume, Verified):
            return resume
        run = Path(str(self.args.output_dir))
        if self.args.should_save:
            durable.tidy(run)
        self.accelerator.wait_for_everyone()
        if resume is None or resume is False:
            return None
        chosen = last_whole(run) if resume is True else Path(str(resume))
        read = durable.verify if self.args.should_save else durable.read_manifest
        check_same(read(chosen), self.described(), chosen)
        return Verified(chosen)


def write_options(folder: Path, options: Mapping[str, Any]) -> None:
    """The options as JSON, without keys, in place of the Trainer's pickle."""
    (folder / "training_args.bin").unlink(missing_ok=True)
    text = json.dumps(without_secrets(dict(options)), indent=1, sort_keys=True, default=str)
    (folder / ARGS_FILE).write_text(text + "\n", encoding="utf-8")


SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class StopOnSignal(TrainerCallback):
    """Ends training after the step in which a signal came, on whatever rank, with a checkpoint. A second one kills.

    The signals are SIGINT (Ctrl-C) and SIGTERM.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.stopped = False
        self._number: int | None = None  # of the signal that came
        self._process = os.getpid()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Signals are noted inside; only the main thread can do that."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a data worker that was forked meanwhile: its end is the run's to decide
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if self._number is not None:
            os._exit(128 + number)
        self._number = number
        # Written at once and past the logger, whose lock the interrupted code may hold.
        name = SIGNALS[signal.Signals(number)]
        text = f"\n{name}: finishing this step, saving a checkpoint, then exiting.\nA second signal kills at once.\n"
        os.write(2, text.encode())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ask for a checkpoint and for the end."""
        if any_rank(self.accelerator, self._number is not None):
            self.stopped = control.should_save = control.should_training_stop = True
        return control

    def error(self, step: int, run: Any) -> StoppedError:
        """What a stopped run raises."""
        number = signal.Signals(self._number or signal.SIGTERM)
        return StoppedError(
            f"Stopped by {SIGNALS[number]} after step {step}. checkpoint-{step} in {run} is complete. Continue with "
            "--resume_from_checkpoint.",
            128 + number,
        )


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Is `flag` set on any rank? One small reduction where there are several."""
    if accelerator.num_processes == 1:
        return flag
    local = torch.tensor(float(flag), device=accelerator.device)
    return bool(accelerator.reduce(local, "sum").item())


def last_whole(run: Path) -> Path:
    """The whole checkpoint of `run` with the highest step; those that are not whole are named and skipped.

    Raises:
        CheckpointError: there is none.
    """
    for step, folder in sorted(_checkpoints(run), reverse=True):
        why = durable.problem(folder)
        if why is None:
            return folder
        logger.warning("checkpoint-%d is skipped: %s", step, why)
    raise CheckpointError(f"There is no complete checkpoint in {run}. Start a new run, without resume_from_checkpoint.")


def rotate(run: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest whole checkpoints beyond `limit`; never the newest, never the best."""
    if not limit or limit <= 0:
        return
    whole = [(durable.age(f), step, f) for step, f in _checkpoints(run) if durable.problem(f) is None]
    ordered = [folder for _, _, folder in sorted(whole)]
    protected = {*ordered[-1:], *(f for f in ordered if best and f == Path(best))}
    spare = [folder for folder in ordered if folder not in protected]
    for folder in spare[: max(len(ordered) - max(limit, len(protected)), 0)]:
        durable.remove(folder)


def _checkpoints(run: Path) -> list[tuple[int, Path]]:
    folders = run.glob("checkpoint-*") if run.is_dir() else ()
    return [(int(n), f) for f in folders if f.is_dir() and (n := f.name.removeprefix("checkpoint-")).isdigit()]
