"""Log-probs of chosen ids at every position of a text, from vLLM's `POST /inference/v1/generate` (0.32).

Row `i` of `sampling_params.prompt_logprob_token_ids` holds the ids that are scored as token `prompt_logprob_start + i +
1`, -1 where it has fewer. The answer's `prompt_token_id_logprobs` is the base64 of a `.npy` file, float32 of the same
shape: four bytes a number instead of some eighty in JSON, and rows of the prompt are not computed. The server needs
`--enable-scale-out` and vLLM's model runner V2.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diglot.arrays import Floats, Ints
from diglot.errors import TeacherError
from diglot.http.client import Client
from diglot.teachers.states import discard_states
from diglot.teachers.wire import NO_MASS, ROUNDING

PATH = "/inference/v1/generate"
_FIXED_BYTES, _BYTES_OF_ID = 2**18, 16


class NotGiven(TeacherError):
    """The server answered and left out the scores of chosen ids."""


def score_chosen(client: Client, model: str, ids: Sequence[int], start: int, chosen: Ints) -> Floats:
    """Log-probs in nats of `chosen` `[R, k]`, row i as token `start + i + 1` of `ids`; -inf where `chosen` is -1.

    Raises:
        Refused: the server does not take the request.
        NotGiven: it ignores what it was asked for.
        TeacherError: an answer of another shape, of other ids, or with what is no log-prob.
    """
    text = [int(i) for i in ids]
    sampling = {
        "max_tokens": 1,
        "temperature": 1.0,
        "prompt_logprob_token_ids": chosen.tolist(),
        "prompt_logprob_start": start,
    }
    limit = _FIXED_BYTES + _BYTES_OF_ID * len(text) + 6 * chosen.size
    body = {"model": model, "token_ids": text, "sampling_params": sampling, "return_token_ids": True}
    answer = client.post(PATH, body, limit=limit)
    discard_states(answer, text)
    return _read(answer, text, start, chosen)


def _read(answer: Any, text: list[int], start: int, chosen: Ints) -> Floats:
    packed = answer.get("prompt_token_id_logprobs") if isinstance(answer, dict) else None
    if not isinstance(packed, str):
        raise NotGiven(
            f"The server's answer to {PATH} has no prompt_token_id_logprobs, which the request asked for. Start vLLM "
            "0.32 or later with --enable-scale-out and its model runner V2 (VLLM_USE_V2_MODEL_RUNNER=1)."
        )
    if (echo := answer.get("prompt_token_ids")) != text:
        count = len(echo) if isinstance(echo, list) else "no"
        raise TeacherError(
            f"The server scored {count} ids that are not the {len(text)} that were sent. It adds tokens of its own, or "
            "answers another request: its numbers cannot be used."
        )
    values = _unpacked(packed, chosen.shape).astype(np.float64)
    named = chosen >= 0
    wrong = named & ~((values <= ROUNDING) & (values > NO_MASS))
    if wrong.any():
        row, column = (int(x) for x in np.argwhere(wrong)[0])
        raise TeacherError(
            f"The server's log-prob of id {chosen[row, column]} at token {start + row + 1} is "
            f"{float(values[row, column])!r}, expected a finite number of at most 0 and above {NO_MASS:.0f}. Look for "
            "NaN in the model's weights, and start vLLM with --logprobs-mode raw_logprobs."
        )
    return np.where(named, np.minimum(values, 0.0), -np.inf)


def _unpacked(packed: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The array of a `.npy` file in base64. Its header is read first, so that no size is taken on trust."""
    try:
        raw = base64.b64decode(packed, validate=True)
        stream = io.BytesIO(raw)
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"version {version}")
        stored_shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except (binascii.Error, ValueError) as error:
        raise TeacherError(f"The server's scores of chosen ids are no whole .npy file: {error}.") from error
    size = len(raw) - stream.tell()
    if stored_shape != shape or fortran or dtype != np.dtype("<f4") or size != 4 * int(np.prod(shape)):
        raise TeacherError(
            f"The server's scores of chosen ids are {stored_shape} of {dtype} in {size} bytes, expected {shape} of "
            f"float32 in {4 * int(np.prod(shape))}. Rows are missing, or its version has another form."
        )
    return np.frombuffer(raw, np.dtype("<f4"), offset=stream.tell()).reshape(shape)
