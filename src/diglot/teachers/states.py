"""Hidden states of a text from vLLM's `extract_hidden_states`: a file that the server writes and names in its answer.

The server (0.32) runs with the speculative method `extract_hidden_states` and `ExampleHiddenStatesConnector`. The
answer's `kv_transfer_params.hidden_states_path` is a safetensors file with `token_ids` `[T]` and `hidden_states`
`[T, L, H]`, one of `L` for each layer that was named; beside it `<path>.lock` stays locked until the file is whole.
"""

from __future__ import annotations

import fcntl
import stat
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diglot.errors import TeacherError
from diglot.http.client import Client

_PAUSE = 0.005  # seconds between two looks

Ids = Sequence[int]


class NotHere(TeacherError):
    """The file that the server named cannot be seen from this machine, or did not become whole in time."""


def request_states(client: Client, model: str, ids: Ids) -> str | None:
    """The name of the file with the states of `ids`; None if the server makes none. No log-probs are asked for."""
    body = {"model": model, "prompt": [int(i) for i in ids], "max_tokens": 1, "temperature": 0.0}
    return path_of(client.post("/v1/completions", body))


def path_of(answer: Any) -> str | None:
    """The file that a server's answer names."""
    about = answer.get("kv_transfer_params") if isinstance(answer, dict) else None
    path = about.get("hidden_states_path") if isinstance(about, dict) else None
    return path if isinstance(path, str) else None


def read_states(name: str, ids: Ids, width: int, first: int, seconds: float) -> Tensor:
    """States of the last layer that the server was told of, at the tokens from `first` on: `[len(ids) - first, H]`.

    Other rows stay on disk. The file is removed once it is known to be the answer about `ids`, and never otherwise:
    its name is the server's word.

    Args:
        width: H.
        seconds: to wait for the file to become whole.

    Raises:
        NotHere: no whole file in time.
        TeacherError: a file that is not about `ids`, of another width, or with numbers that are not finite.
    """
    path, lock = Path(name), Path(f"{name}.lock")
    if not path.is_absolute() or path.suffix != ".safetensors" or not path.parent.is_dir():
        raise NotHere(
            f"The server wrote hidden states to {name!r}, and that folder is not on this machine. Give the server a "
            "shared_storage_path (--kv-transfer-config) on a disk that both see, under the same name."
        )
    _wait(path, lock, seconds)
    try:
        with safe_open(str(path), framework="pt") as file:
            written, states = file.get_tensor("token_ids"), file.get_slice("hidden_states")
            shape = tuple(states.get_shape())
            if written.tolist() != [int(i) for i in ids]:
                raise TeacherError(
                    f"The hidden states in {name!r} are about {len(written)} ids that are not the {len(ids)} that were "
                    "sent. Two servers share one folder, or the server adds tokens of its own."
                )
            if len(shape) != 3 or shape[0] != len(ids) or shape[2] != width:
                raise TeacherError(
                    f"The hidden states in {name!r} are {shape}, expected ({len(ids)}, layers, {width}): the weights "
                    "beside the teacher's tokenizer are not those of the model that is served."
                )
            hidden: Tensor = states[first:, shape[1] - 1 : shape[1], :][:, 0]
    except (SafetensorError, OSError, ValueError) as error:
        raise NotHere(f"The hidden states in {name!r} are no whole file: {error}.") from error
    _remove(path, lock)
    if not bool(torch.isfinite(hidden).all()):
        at = first + int((~torch.isfinite(hidden)).any(-1).nonzero()[0])
        raise TeacherError(
            f"The server's hidden state at token {at} of {len(ids)} holds numbers that are not finite. Look for NaN in "
            "the model's weights, or serve it in bfloat16 instead of float16."
        )
    return hidden


def discard_states(answer: Any, ids: Ids) -> None:
    """Remove the file that an answer names beside what it was asked for, if it is here and about `ids`."""
    name = path_of(answer)
    if name is None or not Path(name).parent.is_dir():
        return
    path, lock = Path(name), Path(f"{name}.lock")
    with suppress(NotHere, SafetensorError, OSError, ValueError):
        _wait(path, lock, seconds=1.0)
        with safe_open(name, framework="pt") as file:
            own = file.get_tensor("token_ids").tolist() == [int(i) for i in ids]
        if own:
            _remove(path, lock)


def _remove(path: Path, lock: Path) -> None:
    path.unlink(missing_ok=True)
    lock.unlink(missing_ok=True)


def _wait(path: Path, lock: Path, seconds: float) -> None:
    """Return once the writer has let go of the lock and the file is there."""
    until = time.monotonic() + seconds
    while True:
        if _released(lock) and _is_file(path):
            return
        if time.monotonic() > until:
            raise NotHere(
                f"The hidden states that the server announced in {str(path)!r} were not there in {seconds:.0f} s."
            )
        time.sleep(_PAUSE)


def _released(lock: Path) -> bool:
    if not _is_file(lock):
        return True  # a server without locks
    try:
        with lock.open("rb") as held:
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return True
    except BlockingIOError:
        return False
    except OSError:  # removed meanwhile
        return True


def _is_file(path: Path) -> bool:
    """Is it a regular file, and no link to one elsewhere?"""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False
