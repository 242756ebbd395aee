"""What a person reads when something went wrong: one message on standard error. Tracebacks go into a file.

Imports neither torch nor transformers: their errors are known by name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diglot.errors import DiglotError, StoppedError

INVALID, UNEXPECTED, INTERRUPTED = 2, 3, 130

MEMORY = (
    "Out of memory. Lower per_device_train_batch_size and raise gradient_accumulation_steps by the same factor (the "
    "loss stays the same), then max_completion_length and max_length; --activation_checkpointing, --use_peft and "
    "--rows_per_chunk take less as well."
)
DISK = (
    "The disk is full or a quota is reached. Free some space (save_total_limit keeps fewer checkpoints), then continue "
    "with the same command and --resume_from_checkpoint: complete checkpoints are untouched."
)
CTRL_C = "Interrupted by Ctrl-C. What was complete on disk before is untouched."
_PATIENCE = 10.0  # seconds that an interrupted command may take to tidy up
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ROOM = ("os error 27", "os error 28", "PytorchStreamWriter failed writing", "unexpected pos ")  # of Rust, of torch


def explain(error: BaseException) -> tuple[str, int]:
    """The message for a person, and the exit code. What Diglot did not raise itself is written into a log file."""
    if isinstance(error, StoppedError):
        return str(error), error.code
    if isinstance(error, KeyboardInterrupt):
        return CTRL_C, INTERRUPTED
    chain = list(_chain(error))
    if any(
        (isinstance(one, OSError) and one.errno in _FULL) or any(words in str(one) for words in _NO_ROOM)
        for one in chain
    ):
        return _with_details(DISK, error), UNEXPECTED
    if any(_is_memory(one) for one in chain):
        return _with_details(MEMORY, error), UNEXPECTED
    if isinstance(error, DiglotError):
        return str(error), INVALID
    if isinstance(error, OSError):  # a path, a network: what it says is all there is to know
        return one_line(error), INVALID
    if isinstance(error, ImportError):
        return _with_details(f"A package is missing or does not fit: {one_line(error)}", error), INVALID
    return _with_details(f"{type(error).__name__}, which Diglot did not expect: {one_line(error)}", error), UNEXPECTED


@contextlib.contextmanager
def ending_on_ctrl_c() -> Iterator[None]:
    """Ctrl-C ends a command inside, also where its exception is lost.

    Python drops those that are raised while an object is deleted or another library's callback runs, and prints them
    with their traceback, which says nothing to anybody here.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    timers: list[threading.Timer] = []

    def interrupt(number: int, frame: Any) -> None:
        timers.append(threading.Timer(_PATIENCE, _leave))
        timers[-1].daemon = True
        timers[-1].start()
        raise KeyboardInterrupt

    def drop(lost: sys.UnraisableHookArgs) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            print_dropped(lost)

    before, print_dropped = signal.signal(signal.SIGINT, interrupt), sys.unraisablehook
    sys.unraisablehook = drop
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        sys.unraisablehook = print_dropped
        for timer in timers:
            timer.cancel()


def _leave() -> None:
    os.write(2, f"\ndiglot: {CTRL_C}\n".encode())
    os._exit(INTERRUPTED)


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks, its end cut."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 500 else f"{text[:500]} ..."


def _chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        words in text for words in ("out of memory", "can't allocate memory", "cannot allocate memory")
    )


def _with_details(message: str, error: BaseException) -> str:
    path = Path(tempfile.gettempdir()) / f"diglot-error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    try:
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    except OSError:
        return message
    return f"{message} Details: {path}"
