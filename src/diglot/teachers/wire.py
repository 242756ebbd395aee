"""What servers are asked and how they answer: one class for each form, all to the same numbers.

`T` tokens of a text, `K` most likely ids of a row. Entry `t` of an answer speaks about token `t` given those before it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from diglot.arrays import Floats, Ints
from diglot.errors import TeacherError
from diglot.http.client import Client, Refused
from diglot.teachers.states import discard_states

NO_MASS = -9000.0
"""vLLM writes -9999 for log 0. A softmax gives every id a mass, so what is below this is no softmax."""
ROUNDING = 1e-2  # a log-probability above 0 by less is rounding
_ENTRY_BYTES, _FIXED_BYTES = 512, 2**20  # of an answer, at most

Ids = Sequence[int]


@dataclass(frozen=True)
class TokenScores:
    """The log-probabilities of a text in nats, and the likeliest ids of each row, best first."""

    logps: Floats  # [T], the first is NaN: nothing comes before it
    top_ids: Ints  # [T, K], -1 where the server gave fewer
    top_logps: Floats  # [T, K], -inf there


@dataclass(frozen=True)
class ServerInfo:
    """What a server says about its model."""

    model: str
    window: int | None  # tokens of prompt and reply together

    @property
    def longest(self) -> int | None:
        """Tokens of the longest text that it scores: it must write one more."""
        return None if self.window is None else max(self.window - 1, 0)


@dataclass(frozen=True)
class Asking:
    """What a request asks for beside the text. The defaults leave the model's distribution as it is; the probe
    changes them."""

    top: int = 1
    temperature: float = 1.0
    top_p: float = 1.0


class Wire(ABC):
    """One form of request and answer."""

    name: ClassVar[str]

    def __init__(self, info: ServerInfo) -> None:
        self.info = info

    @abstractmethod
    def request(self, ids: Ids, asking: Asking) -> tuple[str, dict[str, Any]]:
        """Path and body that ask for the log-probs of `ids`."""

    @abstractmethod
    def read(self, answer: Any, ids: Ids, asking: Asking) -> TokenScores:
        """The numbers of an answer. `TeacherError` for one that is not what was asked for."""

    @abstractmethod
    def tokenize(self, client: Client, text: str) -> list[int] | None:
        """The server's ids of a text, nothing added; None if it does not say."""

    def score(self, client: Client, ids: Ids, asking: Asking) -> TokenScores:
        """Ask and read."""
        path, body = self.request(ids, asking)
        limit = _FIXED_BYTES + _ENTRY_BYTES * (len(ids) + 1) * (asking.top + 2)
        answer = client.post(path, body, limit=limit)
        discard_states(answer, ids)  # a server that hands them out writes them for every request
        return self.read(answer, ids, asking)


class VLLM(Wire):
    """vLLM's completions with `prompt_logprobs`, which it gives raw: before temperature, top-p and penalties."""

    name = "vLLM"

    def request(self, ids: Ids, asking: Asking) -> tuple[str, dict[str, Any]]:
        return "/v1/completions", {
            "model": self.info.model,
            "prompt": [int(i) for i in ids],
            "max_tokens": 1,
            "prompt_logprobs": asking.top,
            "temperature": asking.temperature,
            "top_p": asking.top_p,
        }

    def read(self, answer: Any, ids: Ids, asking: Asking) -> TokenScores:
        choice = _one_choice(answer)
        entries = choice.get("prompt_logprobs")
        if entries is None:
            raise TeacherError(
                "The server answered 200 and left out prompt_logprobs, which the request asked for: it ignores what it "
                "does not know. It cannot be a teacher; serve the model with vLLM or SGLang."
            )
        return _collect(ids, [_of_mapping(e) if isinstance(e, dict) else e for e in _listed(entries)], asking.top)

    def tokenize(self, client: Client, text: str) -> list[int] | None:
        body = {"model": self.info.model, "prompt": text, "add_special_tokens": False}
        return _tokens(client, body)


class SGLang(Wire):
    """SGLang's `/generate` with `return_logprob`."""

    name = "SGLang"

    def request(self, ids: Ids, asking: Asking) -> tuple[str, dict[str, Any]]:
        return "/generate", {
            "input_ids": [int(i) for i in ids],
            "sampling_params": {"max_new_tokens": 1, "temperature": asking.temperature, "top_p": asking.top_p},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": asking.top,
        }

    def read(self, answer: Any, ids: Ids, asking: Asking) -> TokenScores:
        meta = answer.get("meta_info") if isinstance(answer, dict) else None
        token_logps = meta.get("input_token_logprobs") if isinstance(meta, dict) else None
        if not isinstance(meta, dict) or token_logps is None:
            raise TeacherError(
                "The server answered 200 and left out meta_info.input_token_logprobs, which the request asked for. "
                "Look at its version, or serve the model with vLLM."
            )
        rows = _listed(token_logps)
        tops = _listed(meta["input_top_logprobs"]) if asking.top else [None] * len(rows)
        entries: list[Any] = [None]
        for own, top in zip(rows[1:], tops[1:], strict=False):
            entries.append({int(i): logp for logp, i, *_ in [*(top or []), own]})
        return _collect(ids, entries if len(tops) == len(rows) else entries[:-1], asking.top)

    def tokenize(self, client: Client, text: str) -> list[int] | None:
        return _tokens(client, {"model": self.info.model, "prompt": text, "add_special_tokens": False})


def find_wire(client: Client, model: str | None) -> Wire:
    """The form that a server speaks, from what it says about itself; nothing is scored.

    Args:
        model: the model's name at the server; by default the only one that it serves.

    Raises:
        TeacherError: a server that gives no log-probs of a given text, or several models and no name.
    """
    listed = client.get("/v1/models")
    models = [m for m in listed.get("data", []) if isinstance(m, dict)] if isinstance(listed, dict) else []
    names = [str(m.get("id")) for m in models]
    if any(m.get("owned_by") == "llamacpp" for m in models):
        raise TeacherError(
            f"{client.url} is llama.cpp's server, which gives log-probs of what it generates and none of a given text. "
            "Serve the model with vLLM or SGLang, or load the GGUF file as a local teacher."
        )
    if model is None and len(names) != 1:
        raise TeacherError(
            f"{client.url} serves {len(names)} models ({', '.join(names)}), expected one. Name the teacher in "
            "teacher_model_name_or_path and give the address as teacher_model_server_url."
        )
    chosen = model if model is not None else names[0]
    if chosen not in names:
        raise TeacherError(
            f"{client.url} does not serve {chosen!r}; it serves {', '.join(names) or 'nothing'}. Name one of these in "
            "teacher_model_name_or_path, or start the server with --served-model-name."
        )
    about = models[names.index(chosen)]
    window = about.get("max_model_len")
    info = ServerInfo(chosen, window if isinstance(window, int) else None)
    return SGLang(info) if about.get("owned_by") == "sglang" else VLLM(info)


def _tokens(client: Client, body: dict[str, Any]) -> list[int] | None:
    try:
        answer = client.post("/tokenize", body)
    except Refused:
        return None
    ids = answer.get("tokens") if isinstance(answer, dict) else None
    return [int(i) for i in ids] if isinstance(ids, list) else None


def _one_choice(answer: Any) -> dict[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        count = len(choices) if isinstance(choices, list) else "no"
        raise TeacherError(f"The server's answer has {count} choices, expected 1: it does not speak OpenAI's form.")
    return choices[0]


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TeacherError(
            f"The server's log-probs are a {type(value).__name__}, expected a list: look at its version."
        )
    return value


def _of_mapping(entry: dict[str, Any]) -> dict[int, Any]:
    """`{"17": {"logprob": -0.3, ...}, ...}` as `{17: -0.3}`."""
    try:
        return {int(i): one["logprob"] for i, one in entry.items()}
    except (ValueError, TypeError, KeyError) as error:
        raise TeacherError(
            "An entry of the server's prompt_logprobs is not of the form {id: {logprob: ...}}: look at its version."
        ) from error


def _collect(ids: Ids, entries: Sequence[Any], top: int) -> TokenScores:
    """Entries `{id: log-prob}` of every token as arrays, each checked."""
    if len(entries) != len(ids):
        raise TeacherError(
            f"The server gave log-probs of {len(entries)} tokens for a text of {len(ids)}. It reads the ids otherwise "
            "than they were sent; if it adds tokens of its own, switch that off."
        )
    logps = np.full(len(ids), np.nan)
    top_ids = np.full((len(ids), top), -1, dtype=np.int64)
    top_logps = np.full((len(ids), top), -np.inf)
    for t in range(1, len(ids)):
        entry, own = entries[t], int(ids[t])
        if not isinstance(entry, dict) or own not in entry:
            seen = sorted(entry)[:5] if isinstance(entry, dict) else entry
            raise TeacherError(
                f"Entry {t} of the server's log-probs does not hold the token that was sent there: id {own} is not "
                f"among {seen}. Its entries stand at other positions than the tokens that they are about, or it reads "
                "other ids than were sent; its numbers cannot be used. Serve the model with vLLM or SGLang."
            )
        _check_values(entry, t)
        logps[t] = min(entry[own], 0.0)
        best = sorted(entry.items(), key=lambda both: -both[1])[:top]
        for k, (i, logp) in enumerate(best):
            top_ids[t, k], top_logps[t, k] = i, min(logp, 0.0)
    return TokenScores(logps, top_ids, top_logps)


def _check_values(entry: dict[int, Any], t: int) -> None:
    for i, logp in entry.items():
        number = isinstance(logp, (int, float)) and not isinstance(logp, bool) and logp == logp
        if not number or logp > ROUNDING:
            raise TeacherError(
                f"The server's log-prob of id {i} at token {t} is {logp!r}, expected a finite number of at most 0. "
                "With vLLM, look for NaN in the model's weights and start it with --logprobs-mode raw_logprobs."
            )
        if logp < NO_MASS:
            raise TeacherError(
                f"The server's log-prob of id {i} at token {t} is {logp!r}, which is no mass at all: its "
                "distribution was cut "
                "(top-p, top-k or a grammar) before the log-probs were taken. Start it so that it gives raw log-probs."
            )
