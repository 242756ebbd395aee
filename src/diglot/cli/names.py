"""Names of models before anything is loaded: a wrong one is an error that says whose name it is, and of which option.

A name is a folder on this machine, a copy in the hub's cache, or a repository of the hub, which is asked for at most
`SECONDS`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diglot.errors import ConfigError
from diglot.http.address import is_address

SECONDS = 10.0  # that the hub may take to answer
SIDES = {  # whose name an option holds
    "student": "model_name_or_path",
    "student's tokenizer": "tokenizer_name_or_path",
    "teacher": "teacher_model_name_or_path",
    "teacher's tokenizer": "teacher_tokenizer_name_or_path",
}
_DATA = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".zst")
_FILES = ("config.json", "adapter_config.json", "tokenizer_config.json", "tokenizer.json")


def check_model_name(name: str, side: str, option: str, revision: str | None = None) -> None:
    """`ConfigError` if there is nothing to load under `name`.

    Args:
        side: whose name it is, as "teacher" or "student's tokenizer".
        option: how the user gave it.
    """
    place = Path(name).expanduser()
    if place.exists():
        _check_folder(place, name, side, option)
    elif not is_address(name) and (_is_path(name) or name.count("/") > 1):
        raise ConfigError(f"The {side} is {name!r} ({option}), and there is no such folder. Check the path.")
    else:
        _check_hub(name, side, option, revision)


def check_paths(values: Mapping[str, Any]) -> None:
    """`ConfigError` for a path among the options of `diglot train` that is not there, before any library is loaded.

    Names that may be repositories of the hub are looked for later.
    """
    for side, option in SIDES.items():
        name = values.get(option)
        if isinstance(name, str) and (_is_path(name) or Path(name).exists()):
            check_model_name(name, side, option)
    for option in ("dataset_name", "eval_dataset_name", "lm_dataset_name"):
        check_data(values.get(option), option)


def check_data(name: Any, option: str) -> None:
    """`ConfigError` for the path of data that is not there. Lists and names on the hub are looked at later."""
    if isinstance(name, str) and (_is_path(name) or name.endswith(_DATA)) and not Path(name).expanduser().exists():
        raise ConfigError(
            f"The data is {name!r} ({option}), and there is no such file or folder (looked from {Path.cwd()})."
        )


def check_folder(out: Path, option: str) -> None:
    """`ConfigError` if nothing can be written below `out`, which need not be there."""
    for place in (out, *out.parents):
        if place.exists():
            if not place.is_dir():
                raise ConfigError(f"{option} is {str(out)!r}, and {place} is a file. Choose a folder.")
            if not os.access(place, os.W_OK | os.X_OK):
                raise ConfigError(f"{option} is {str(out)!r}, and nothing may be written into {place}. Choose another.")
            return


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~", "\\"))


def _check_folder(place: Path, name: str, side: str, option: str) -> None:
    if place.is_file():
        if place.suffix == ".gguf":
            return
        raise ConfigError(f"The {side} is {name!r} ({option}): a file, expected the folder of a model.")
    if not any((place / one).exists() for one in (*_FILES, "request.json")) and not any(place.glob("*.gguf")):
        raise ConfigError(
            f"The {side} is {name!r} ({option}): a folder without a model, it has none of {', '.join(_FILES)}."
        )


def _check_hub(name: str, side: str, option: str, revision: str | None) -> None:
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    what = f"The {side} is {name!r} ({option})"
    here = f"and there is no folder of this name under {Path.cwd()}"
    try:
        known = [try_to_load_from_cache(name, one, revision=revision) for one in _FILES]
    except HFValidationError:
        raise ConfigError(f"{what}, {here}, nor can a repository of the hub be called so. Check the name.") from None
    if any(isinstance(one, str) for one in known):
        return
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"{what}, {here}, nor a copy in the hub's cache; HF_HUB_OFFLINE forbids to fetch it.")
    try:
        _within(SECONDS, lambda: get_hf_file_metadata(hf_hub_url(name, _FILES[0], revision=revision), timeout=SECONDS))
    except GatedRepoError:
        raise ConfigError(f"{what}: the hub wants its terms accepted on its page first. Then: hf auth login.") from None
    except RevisionNotFoundError:
        raise ConfigError(f"{what}, and the hub has no revision {revision!r} of it.") from None
    except RepositoryNotFoundError:
        raise ConfigError(f"{what}, {here}, and the hub has no such repository, or a private one.") from None
    except Exception as error:
        if type(error).__name__ in ("EntryNotFoundError", "RemoteEntryNotFoundError"):
            return  # the repository is there; what it lacks is said when it is loaded
        raise ConfigError(
            f"{what}, {here}, and the hub cannot be asked ({type(error).__name__}). Check the network and the name, or "
            "give a folder."
        ) from error


def _within(seconds: float, work: Callable[[], Any]) -> None:
    """What `work` raises, or `TimeoutError` where it takes longer: looking up an address has no limit of its own."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer after {seconds:g} s")
    if raised:
        raise raised[0]
