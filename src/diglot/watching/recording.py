"""What a run leaves behind while it goes on: its metrics, its warnings, a line on the screen. Callbacks only."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from diglot.report import Advice, advise
from diglot.report.advice import selection
from diglot.report.records import METRICS, ROLLOUTS, append, keep
from diglot.watching.shown import as_text, numbers_that_matter

logger = logging.getLogger(__name__)


class RecordCallback(TrainerCallback):
    """Appends every log to `metrics.jsonl` and says once of each kind what looks wrong. Main process only.

    A run that goes on from a checkpoint keeps what was written up to it, and drops what came later: those steps are
    done again. A run that starts anew sets the files of an older one aside, as `*.old`.

    Args:
        observe: called on every rank before the first step ("before") and after the last ("after").
        steps: gives how the student wrote, step by step; logs may come too rarely for what happens within twenty.
    """

    def __init__(
        self, observe: Callable[[str], None], steps: Callable[[], Sequence[Mapping[str, Any]]] = lambda: ()
    ) -> None:
        self.observe, self.steps = observe, steps
        self._warned: set[str] = set()
        self._written = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._take_up(Path(args.output_dir), state.global_step)
        if state.global_step == 0:
            self.observe("before")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.observe("after")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        append(Path(args.output_dir) / METRICS, {"step": state.global_step, **logs})
        self._written += 1
        self._say(args, advise([entry for entry in state.log_history if "train_runtime" not in entry]))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero and (advice := selection(self.steps())) is not None:
            self._say(args, [advice])

    def _say(self, args: Any, advice: Sequence[Advice]) -> None:
        """Each kind once a run: in the terminal and in the log."""
        for one in advice:
            if one.name not in self._warned:
                self._warned.add(one.name)
                logger.warning("Step %d: %s", one.step, one.text)
                line = {"step": one.step, "warning": one.name, "text": one.text}
                append(Path(args.output_dir) / METRICS, line)

    def _take_up(self, folder: Path, step: int) -> None:
        if step:
            keep(folder / METRICS, lambda record: record["step"] <= step)
            keep(folder / ROLLOUTS, lambda record: record["step"] < step)
        elif not self._written:  # what this process wrote before step 0, an evaluation, belongs to this run
            for name in (METRICS, ROLLOUTS):
                if (folder / name).exists():
                    (folder / name).replace(folder / f"{name}.old")


class NumbersProgress(ProgressCallback):
    """The Trainer's progress bar with the numbers that matter on it, and one line of them for every log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        bar: Any = self.training_bar
        if not state.is_world_process_zero or bar is None or not logs:
            return
        numbers = numbers_that_matter(logs)
        if numbers:
            bar.set_postfix({k: v for k, v in numbers.items() if k in ("loss", "nats/byte")})  # in 80 columns
            width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
            bar.write(as_text(state.global_step, numbers, width))


def with_numbers(trainer: Any) -> None:
    """Put a bar with the numbers that matter in the place of the Trainer's own, in terminals and in notebooks."""
    for one in list(trainer.callback_handler.callbacks):
        if type(one) is ProgressCallback:
            trainer.remove_callback(one)
            trainer.add_callback(NumbersProgress())
        elif type(one).__name__ == "NotebookProgressCallback":
            from diglot.watching.notebook import NotebookNumbers

            trainer.remove_callback(one)
            trainer.add_callback(NotebookNumbers())
