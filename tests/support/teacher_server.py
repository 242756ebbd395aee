"""A teacher's server on loopback: a tiny model's scores in vLLM's form, and every way in which a server goes wrong.

`faults` are taken one for each scoring request and then gone; `manner` is how the server is, until it is changed.
"""

from __future__ import annotations

import base64
import fcntl
import io
import json
import math
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

MANNERS = (
    "right",
    "late",  # entry t is the distribution that comes after token t
    "early",  # entry t is the distribution before token t - 1
    "ignores",  # 200 and no log-probs
    "tempered",  # log-probs follow the request's temperature
    "top_p",  # and its top_p
    "cut",  # a top-p of its own; what is cut has log-prob -9999
    "logits",  # no log-probs but logits
    "nan",
    "infinite",
    "positive",
    "wrong_length",
    "other_ids",
    "no_top",
)
STATES = (
    "right",
    "unfinite",
    "other_ids",
    "short",
    "truncated",
    "absent",
    "narrow",
    "unnamed",
    "link",
)
CHOSEN = (
    "right",
    "ignores",
    "nan",
    "infinite",
    "positive",
    "other_ids",
    "rows",
    "float64",
    "truncated",
    "pickle",
    "late",
)
"""How scores of chosen ids come back."""
"""What becomes of a file of hidden states, as `ExampleHiddenStatesConnector` of vLLM 0.32 writes it."""


class TeacherServer:
    """The server and what it was asked."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, window: int | None = 512) -> None:
        self.model, self.tokenizer, self.window = model, tokenizer, window
        self.manner, self.faults, self.latency = "right", list[Any](), 0.0
        self.key: str | None = None
        self.form = "vllm"  # or "sglang"
        self.max_logprobs, self.vocabulary = 64, model.config.vocab_size
        self.requests: list[dict[str, Any]] = []
        self.under_way = self.most_under_way = 0
        self.held: threading.Event | None = None  # no answer before it is set
        self.gave_up_waiting = 0
        self.states: Path | None = None  # a folder, as with `extract_hidden_states`
        self.state, self.layer = "right", -1
        self.scale_out, self.choice = False, "right"  # as with `--enable-scale-out`
        self.lock = threading.Lock()
        self.connections: set[socket.socket] = set()
        self.http: ThreadingHTTPServer | None = None
        self.host, self.port = "127.0.0.1", 0

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def start(self) -> TeacherServer:
        """Listen; on the old port, if there was one."""
        handler = type("Handler", (_Handler,), {"owner": self})
        self.http = ThreadingHTTPServer((self.host, self.port), handler)
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Hear nothing any more, on kept connections either."""
        if self.http is not None:
            self.http.shutdown()
            for connection in list(self.connections):
                with suppress(OSError):  # it went by itself
                    connection.shutdown(socket.SHUT_RDWR)
            self.http.server_close()
            self.http = None

    # ---- scores ------------------------------------------------------------------------------------------------

    def refusal(self, body: dict[str, Any]) -> str | None:
        """As vLLM words them."""
        ids = body["prompt"]
        if self.window is not None and len(ids) + body["max_tokens"] > self.window:
            return (
                f"This model's maximum context length is {self.window} tokens. However, your prompt contains {len(ids)}"
            )
        if body.get("prompt_logprobs", 0) > self.max_logprobs:
            return f"Requested prompt logprobs of {body['prompt_logprobs']}, greater than max: {self.max_logprobs}"
        if max(ids) >= self.vocabulary:
            return f"Token id {max(ids)} is out of vocabulary"
        return None

    def sglang(self, body: dict[str, Any]) -> dict[str, Any]:
        """The same scores as `/generate` of SGLang gives them: rows of [log-prob, id, text]."""
        ids, sampling = body["input_ids"], body["sampling_params"]
        assert body["return_logprob"] and body["logprob_start_len"] == 0
        request = {"prompt": ids, "prompt_logprobs": body["top_logprobs_num"], **sampling}
        entries = [{int(i): one["logprob"] for i, one in (e or {}).items()} for e in self.entries(request)]
        rows = [[None, ids[0], None], *([e[i], i, None] for e, i in zip(entries[1:], ids[1:], strict=False))]
        best = [sorted(e.items(), key=lambda both: -both[1])[: body["top_logprobs_num"]] for e in entries[1:]]
        top = [None, *([[logp, i, None] for i, logp in row] for row in best)]
        return {"text": "x", "meta_info": {"input_token_logprobs": rows, "input_top_logprobs": top}}

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "text": "x", "finish_reason": "length"}
        if self.manner != "ignores":
            choice["prompt_logprobs"] = self.entries(body) if "prompt_logprobs" in body else None
        results: dict[str, Any] = {"object": "text_completion", "choices": [choice]}
        if self.states is not None and self.state != "unnamed":
            results["kv_transfer_params"] = {"hidden_states_path": self.write_states(self.states, body["prompt"])}
        return results

    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        """`/inference/v1/generate` of vLLM 0.32 with chosen ids: row i scores them as token `start + i + 1`."""
        ids, sampling = body["token_ids"], body["sampling_params"]
        start, chosen = sampling["prompt_logprob_start"], torch.tensor(sampling["prompt_logprob_token_ids"])
        assert len(chosen) <= len(ids) - 1 - start and chosen.shape[1] <= self.max_logprobs
        with self.lock, torch.no_grad():
            logps = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        first = start + (self.choice == "late")
        result = logps[first : first + len(chosen)].gather(-1, chosen.clamp(min=0)).masked_fill(chosen < 0, -math.inf)
        value = {"nan": math.nan, "infinite": -math.inf, "positive": 0.5}.get(self.choice)
        if value is not None:
            result[-1, 0] = value
        array = {"rows": result[:-1], "float64": result.double()}.get(self.choice, result).numpy()
        buffer = io.BytesIO()
        np.save(
            buffer, array.astype(object) if self.choice == "pickle" else array, allow_pickle=self.choice == "pickle"
        )
        raw = buffer.getvalue()
        packed = base64.b64encode(raw[: len(raw) // 2] if self.choice == "truncated" else raw).decode()
        echo = [*ids, 1] if self.choice == "other_ids" else ids
        scores = None if self.choice == "ignores" else packed
        choices = [{"index": 0, "token_ids": [1], "finish_reason": "length", "logprobs": None}]
        return {"choices": choices, "prompt_token_id_logprobs": scores, "prompt_token_ids": echo}

    def write_states(self, folder: Path, ids: list[int]) -> str:
        """`hidden_states [T, L, H]` before the norm and `token_ids [T]`; the lock is held until they are whole."""
        seen: list[Tensor] = []
        layer = self.model.model.layers[self.layer]
        with self.lock, torch.no_grad():
            hook = layer.register_forward_hook(lambda module, args, output: seen.append(output))
            self.model(torch.tensor([ids]))
            hook.remove()
        states = (seen[0] if isinstance(seen[0], Tensor) else seen[0][0])[0]
        path = folder / f"cmpl-{uuid4().hex}.safetensors"
        if self.state == "unfinite":
            states[-1, 0] = float("nan")
        states = {"short": states[:-1], "narrow": states[:, 1:]}.get(self.state, states)
        tokens = torch.tensor(ids) + (self.state == "other_ids")
        tensors = {"hidden_states": states[:, None].contiguous(), "token_ids": tokens}
        whole = save({k: v.contiguous() for k, v in tensors.items()})
        lock = os.open(f"{path}.lock", os.O_CREAT | os.O_WRONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)

        def write() -> None:
            time.sleep(self.latency)
            if self.state == "link":
                (folder / "elsewhere").write_bytes(whole)
                path.symlink_to(folder / "elsewhere")
            elif self.state != "absent":
                path.write_bytes(whole[: len(whole) // 2] if self.state == "truncated" else whole)
            os.close(lock)

        threading.Thread(target=write, daemon=True).start()
        return str(path)

    def entries(self, body: dict[str, Any]) -> list[Any]:
        ids = [(i + 1) % self.vocabulary for i in body["prompt"]] if self.manner == "other_ids" else body["prompt"]
        with self.lock, torch.no_grad():
            logits = self.model(torch.tensor([ids])).logits[0].float()
        rows = self.distributions(logits, body)
        results: list[Any] = [None]
        for t in range(1, len(ids)):
            row = rows[{"late": t, "early": max(t - 2, 0)}.get(self.manner, t - 1)]
            top = 0 if self.manner == "no_top" else body["prompt_logprobs"]
            named = [*row.topk(top).indices.tolist(), *([] if self.manner == "late" else [ids[t]])]
            entry = {str(i): {"logprob": max(row[i].item(), -9999.0), "decoded_token": "?"} for i in named}
            results.append(entry)
        return self.spoilt(results)

    def distributions(self, logits: Tensor, body: dict[str, Any]) -> Tensor:
        if self.manner == "logits":
            return logits
        if self.manner == "tempered":
            logits = logits / body["temperature"]
        top_p = {"top_p": body.get("top_p", 1.0), "cut": 0.5}.get(self.manner, 1.0)
        probs = logits.softmax(-1)
        if top_p < 1:
            best, order = probs.sort(-1, descending=True)
            keep = best.cumsum(-1) - best < top_p
            probs = torch.zeros_like(probs).scatter(-1, order, best * keep)
            floor = 1e-30 if self.manner == "top_p" else 0.0
            probs = (probs + floor) / probs.sum(-1, keepdim=True)
        return probs.log() if top_p < 1 else logits.log_softmax(-1)

    def spoilt(self, entries: list[Any]) -> list[Any]:
        if self.manner == "wrong_length":
            return entries[:-1]
        value = {"nan": float("nan"), "infinite": float("-inf"), "positive": 0.7}.get(self.manner)
        if value is not None:
            next(iter(entries[-1].values()))["logprob"] = value
        return entries


class _Handler(BaseHTTPRequestHandler):
    owner: TeacherServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.owner.connections.add(self.connection)

    def finish(self) -> None:
        self.owner.connections.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def log_message(self, *args: Any) -> None:
        """Silence."""

    def do_GET(self) -> None:
        if not self.allowed():
            return
        if self.path != "/v1/models":
            return self.send({"detail": "Not Found"}, 404)
        model = {"id": "tiny", "object": "model", "owned_by": self.owner.form, "max_model_len": self.owner.window}
        self.send({"object": "list", "data": [model]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        if self.path == "/tokenize":
            ids = self.owner.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
            return self.send({"tokens": ids, "count": len(ids)})
        if self.path == "/generate" and self.owner.form == "sglang":
            self.owner.requests.append(body)
            return self.send(self.owner.sglang(body))
        if self.path == "/inference/v1/generate" and self.owner.scale_out:
            self.owner.requests.append(body)
            return self.send(self.owner.generate(body))
        if self.path != "/v1/completions":
            return self.send({"detail": "Not Found"}, 404)
        with self.counted(body):
            self.complete(body)

    @contextmanager
    def counted(self, body: dict[str, Any]) -> Iterator[None]:
        owner = self.owner
        with owner.lock:
            owner.requests.append(body)
            owner.under_way += 1
            owner.most_under_way = max(owner.most_under_way, owner.under_way)
        try:
            yield
        finally:
            with owner.lock:
                owner.under_way -= 1

    def complete(self, body: dict[str, Any]) -> None:
        owner = self.owner
        time.sleep(owner.latency)
        if owner.held is not None and not owner.held.wait(10):
            owner.gave_up_waiting += 1
        with owner.lock:
            fault = owner.faults.pop(0) if owner.faults else None
        if fault is not None:
            return self.fail(fault, body)
        refused = owner.refusal(body)
        if refused is not None:
            return self.send({"error": {"message": refused, "code": 400}}, 400)
        self.send(owner.answer(body))

    def fail(self, fault: Any, body: dict[str, Any]) -> None:
        whole = json.dumps(self.owner.answer(body)).encode()
        if isinstance(fault, tuple):
            status, headers = fault
            return self.send({"error": {"message": f"no, {self.headers.get('Authorization')}"}}, status, headers)
        if fault == "truncated":
            return self.send_bytes(whole[: len(whole) // 2], len(whole) // 2)
        if fault == "reset":
            self.send_bytes(whole[: len(whole) // 2], len(whole))
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_WR)
            self.close_connection = True
        elif fault == "slow":
            time.sleep(0.6)
            self.send_bytes(whole, len(whole))
        elif fault == "drip":
            self.send_bytes(b"", 10_000)
            for _ in range(40):
                time.sleep(0.05)
                self.wfile.write(b" ")
        elif fault == "huge":
            self.send_bytes(b" " * 2**23, 2**23)
        else:
            raise AssertionError(fault)

    def allowed(self) -> bool:
        if self.owner.key is None or self.headers.get("Authorization") == f"Bearer {self.owner.key}":
            return True
        self.send({"error": {"message": f"wrong key: {self.headers.get('Authorization')}"}}, 401)
        return False

    def send(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        text = json.dumps(value).encode()
        self.send_bytes(text, len(text), status, headers)

    def send_bytes(self, text: bytes, length: int, status: int = 200, headers: dict[str, str] | None = None) -> None:
        try:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": str(length)}.items():
                self.send_header(name, value)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)
        except OSError:  # the client has hung up
            self.close_connection = True
