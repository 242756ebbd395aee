"""The forms of request and answer: vLLM's completions and generate with `prompt_logprobs`, SGLang's `/generate`.

A request asks for scores of ids; nothing is generated. What it asks for beside that is refused, by name: an answer that
left a part of it out would look whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diglot.arrays import Ints
from diglot.engines.project import Projected
from diglot.engines.transcript import as_ids
from diglot.errors import DataError

# About what would be sampled, or who asks: nothing is sampled, and log-probs are the model's own.
_IDLE = frozenset({
    "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "user", "request_id", "rid", "priority",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "skip_special_tokens", "ignore_eos", "best_of",
    "spaces_between_special_tokens", "return_token_ids", "return_text_in_logprobs", "min_tokens", "detokenize",
    "include_stop_str_in_output", "no_stop_trim", "min_new_tokens",
})  # fmt: skip


@dataclass(frozen=True)
class Query:
    """Texts to score and how many of the likeliest ids of each row."""

    texts: tuple[Ints, ...]
    top: int
    single: bool = True  # one text, not a list of one
    start: int = 0  # SGLang: the first place that the answer holds


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    texts: int = 64
    tokens: int = 131_072  # of one text
    top: int = 20


def parse_body(body: bytes) -> dict[str, Any]:
    """The JSON object of a body. `DataError` for anything else."""
    try:
        result = json.loads(body)
    except (ValueError, RecursionError):  # a number too long, or too deep a nest, are of these too
        raise DataError(f"The body of {len(body)} bytes is no JSON that can be read. Send one JSON object.") from None
    if not isinstance(result, dict):
        raise DataError(f"The body is a JSON {type(result).__name__}, expected an object.")
    return result


def read_vllm(body: Mapping[str, Any], limits: Limits) -> Query:
    """A request to `/v1/completions`. Raises `DataError` that names what cannot be done."""
    _only(body, {"model", "prompt", "max_tokens", "prompt_logprobs", "n", "stream", "logprobs", "echo"})
    _scores_only(body.get("max_tokens", 1), "max_tokens")
    for name, nothing in (("n", (1,)), ("stream", (False, None)), ("logprobs", (None,)), ("echo", (False, None))):
        _nothing_generated(body.get(name, nothing[0]), name, nothing)
    top = body.get("prompt_logprobs")
    if top is None:
        raise DataError("prompt_logprobs is missing: this server scores texts and generates nothing. Send 0 or more.")
    texts, single = _texts(body.get("prompt"), "prompt", limits)
    return Query(texts, _count(top, "prompt_logprobs", limits.top), single)


def read_generate(body: Mapping[str, Any], limits: Limits) -> Query:
    """A request to vLLM's `/inference/v1/generate`. Raises `DataError` that names what cannot be done."""
    _only(body, {"model", "token_ids", "sampling_params", "stream"})
    sampling = body.get("sampling_params")
    if not isinstance(sampling, dict):
        raise DataError(f"sampling_params is {type(sampling).__name__}, expected an object with prompt_logprobs.")
    _only(sampling, {"max_tokens", "prompt_logprobs", "n", "logprobs", "echo"}, "sampling_params.")
    query = read_vllm({**sampling, "prompt": body.get("token_ids"), "stream": body.get("stream")}, limits)
    if not query.single:
        raise DataError("token_ids holds lists, expected the ids of one text.")
    return query


def read_sglang(body: Mapping[str, Any], limits: Limits) -> Query:
    """A request to `/generate`. Raises `DataError` that names what cannot be done."""
    _only(
        body,
        {"model", "input_ids", "sampling_params", "return_logprob", "logprob_start_len", "top_logprobs_num", "stream"},
    )
    sampling = body.get("sampling_params")
    if sampling is None:
        sampling = {}
    if not isinstance(sampling, dict):
        raise DataError(f"sampling_params is a {type(sampling).__name__}, expected an object.")
    _only(sampling, {"max_new_tokens", "n"}, "sampling_params.")
    _scores_only(sampling.get("max_new_tokens", 1), "sampling_params.max_new_tokens")
    _nothing_generated(body.get("stream"), "stream", (False, None))
    _nothing_generated(sampling.get("n", 1), "sampling_params.n", (1,))
    if body.get("return_logprob") is not True:
        raise DataError(
            f"return_logprob is {body.get('return_logprob')!r:.40}: this server scores texts and generates nothing. "
            "Send return_logprob true."
        )
    texts, single = _texts(body.get("input_ids"), "input_ids", limits)
    top, start = (0 if body.get(name) is None else body[name] for name in ("top_logprobs_num", "logprob_start_len"))
    top = _count(top, "top_logprobs_num", limits.top)
    start = _count(start, "logprob_start_len", min(len(ids) for ids in texts))
    return Query(texts, top, single, start)


def vllm_answer(query: Query, result: Sequence[Projected], model: str, number: str, unscored: float | None) -> Any:
    """As vLLM answers: for each id a mapping of ids to log-probs, None where nothing is known."""
    choices = []
    for k, (ids, one) in enumerate(zip(query.texts, result, strict=True)):
        both = enumerate(zip(ids.tolist(), rows(ids, one, query.top), strict=True))
        entries = [_vllm_entry(row, unscored, i, at) for at, (i, row) in both]
        choices.append(
            {"index": k, "text": "", "finish_reason": "length", "logprobs": None, "prompt_logprobs": entries}
        )
    return {
        "id": number,
        "object": "text_completion",
        "created": 0,
        "model": model,
        "choices": choices,
        "usage": _usage(query),
        "diglot": _notes(result),
    }


def generate_answer(query: Query, result: Sequence[Projected], number: str, unscored: float | None) -> Any:
    """As vLLM's `/inference/v1/generate` answers."""
    choice = vllm_answer(query, result, "", number, unscored)["choices"][0]
    return {
        "request_id": number,
        "choices": [{"index": 0, "logprobs": None, "finish_reason": "length", "token_ids": []}],
        "prompt_logprobs": choice["prompt_logprobs"],
        "diglot": _notes(result),
    }


def sglang_answer(query: Query, result: Sequence[Projected], number: str, unscored: float | None) -> Any:
    """As SGLang answers: rows of [log-prob, id, text], None as log-prob where nothing is known."""
    answers = []
    for ids, one in zip(query.texts, result, strict=True):
        own: list[Any] = []
        top: list[Any] = []
        for at, (i, row) in enumerate(zip(ids.tolist(), rows(ids, one, query.top), strict=True)):
            nothing = unscored if at else None
            own.append([nothing if row is None else _number(one.logps[at]), i, None])
            named = row if row is None else sorted(row[1:] if row[0][2] else row, key=lambda e: -e[1])
            top.append([[logp, j, None] for j, logp, _ in named[: query.top]] if named and query.top else None)
        meta = {
            "id": number,
            "finish_reason": {"type": "length", "length": 0},
            "prompt_tokens": len(ids),
            "completion_tokens": 0,
            "input_token_logprobs": own[query.start :],
            "output_token_logprobs": [],
            **({"input_top_logprobs": top[query.start :], "output_top_logprobs": []} if query.top else {}),
            "diglot": _notes([one]),
        }
        answers.append({"text": "", "output_ids": [], "meta_info": meta})
    return answers[0] if query.single else answers


_UNKNOWN = 0.1  # of a distribution: where more is not known, none is given
Row = list[tuple[int, float, bool]]  # (id, log-prob, is it there only because it was written?), the written one first


def rows(ids: Ints, result: Projected, top: int) -> list[Row | None]:
    """For each id what is said about it: the id itself, and others where enough of the distribution is known.

    There the written id's own log-prob is that of the distribution which the others are of; elsewhere it is its credit.
    """
    made: list[Row | None] = [None] * len(ids)
    for at in np.flatnonzero(result.valid).tolist():
        made[at] = [(int(ids[at]), _number(result.logps[at]), True)]
    if not top or result.likeliest is None or result.at is None:
        return made
    named, logps, known = result.likeliest.ids, result.likeliest.logps, result.likeliest.unknown <= _UNKNOWN
    for k, at in enumerate(result.at.tolist()):
        own = np.flatnonzero(named[k] == ids[at])
        if made[at] is None or not known[k] or not len(own):
            continue
        place = int(own[0])
        best = [(i, _number(lp), False) for i, lp in zip(named[k].tolist(), logps[k].tolist(), strict=True) if i >= 0]
        written = (int(ids[at]), best[place][1], place >= top)
        made[at] = [written, *(entry for i, entry in enumerate(best[:top]) if i != place)]
    return made


def _vllm_entry(row: Row | None, unscored: float | None, own: int, at: int) -> dict[str, Any] | None:
    if row is None:
        return None if unscored is None or not at else {str(own): _named(unscored, 1)}
    ranks = {i: rank for rank, (i, *_) in enumerate(sorted(row, key=lambda entry: -entry[1]), start=1)}
    return {str(i): _named(logp, ranks[i]) for i, logp, _ in row}  # the written id first, as vLLM has it


def _named(logp: float, rank: int) -> dict[str, Any]:
    return {"logprob": logp, "rank": rank, "decoded_token": None}


def _number(logp: float) -> float:
    """As vLLM writes log 0, since JSON has no infinity."""
    return float(logp) if math.isfinite(logp) else -9999.0


def _usage(query: Query) -> dict[str, int]:
    count = sum(len(ids) for ids in query.texts)
    return {"prompt_tokens": count, "completion_tokens": 0, "total_tokens": count}


def _notes(result: Sequence[Projected]) -> dict[str, Any]:
    """How much of what was sampled is scored: a field of its own, which clients of either form pass over."""
    sampled, valid = (sum(int(getattr(one, name).sum()) for one in result) for name in ("sampled", "valid"))
    return {"sampled_tokens": sampled, "scored_tokens": valid}


def _only(body: Mapping[str, Any], known: set[str], where: str = "") -> None:
    unknown = [where + key[:40] for key in body if key not in known and key not in _IDLE]
    if unknown:
        raise DataError(f"This server does not know {', '.join(sorted(unknown)[:5])}. Leave it out: it only scores.")


def _scores_only(count: Any, name: str) -> None:
    if type(count) is not int or count not in (0, 1):
        raise DataError(f"{name} is {count!r:.40}, expected 0 or 1: this server scores texts and generates nothing.")


def _nothing_generated(value: Any, name: str, nothing: tuple[Any, ...]) -> None:
    if not any(value is one or (type(value) is type(one) and value == one) for one in nothing):
        raise DataError(
            f"{name} is {value!r:.40}, which is about what is generated, and this server only scores. Leave it out."
        )


def _count(value: Any, name: str, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise DataError(f"{name} is {value!r:.40}, expected a whole number from 0 to {most}.")
    return value


def _texts(value: Any, name: str, limits: Limits) -> tuple[tuple[Ints, ...], bool]:
    """One list of ids, or a list of such lists."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{name} is {type(value).__name__ if value != [] else 'empty'}, expected a list of token ids.")
    single = not isinstance(value[0], list)
    texts = [value] if single else value
    if len(texts) > limits.texts:
        raise DataError(f"{name} holds {len(texts)} texts, at most {limits.texts} are taken. Send several requests.")
    for k, ids in enumerate(texts):
        if not isinstance(ids, list) or not ids:
            what = "empty" if ids == [] else type(ids).__name__
            raise DataError(f"Text {k} of {name} is {what}, expected a list of token ids.")
        if len(ids) > limits.tokens:
            raise DataError(f"Text {k} of {name} has {len(ids)} ids, at most {limits.tokens} are taken.")
        if wrong := [i for i in ids if type(i) is not int or not 0 <= i < 2**31]:
            raise DataError(f"{name} holds {wrong[0]!r:.40}, expected token ids: whole numbers from 0.")
    return tuple(as_ids(ids) for ids in texts), single
