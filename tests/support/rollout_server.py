"""vLLM's server on loopback as far as rollouts need it, over a tiny model, right and wrong."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

MANNERS = (
    "right",
    "stale",  # says that it loaded new weights, and did not
    "no_dev",  # started without its endpoints for development
    "no_ids",  # an older version: no ids in its answers
    "own_stop",  # ends where it likes
    "keeps_cache",  # old keys and values
    "refuses",  # does not find the folder, and is gone
    "busy",  # 503 at first
    "gone",  # 503 for ever, once it has loaded weights twice
)


class RolloutServer:
    """The server and what it was asked."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, window: int = 512) -> None:
        self.model, self.tokenizer, self.window = model, tokenizer, window
        self.manner, self.shift = "right", 0.0  # nats that are added to the log-probs it says
        self.requests: list[tuple[str, Any]] = []
        self.loaded, self.busy, self.paused = 0, 3, False
        self.lock = threading.Lock()
        self.host = "127.0.0.1"
        self.http: Any = None

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.http.server_address[1]}"

    def start(self) -> RolloutServer:
        handler = type("Handler", (_Handler,), {"owner": self})
        self.http = ThreadingHTTPServer((self.host, 0), handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def bodies_of(self, path: str) -> list[Any]:
        """The bodies of all requests to a path."""
        return [body for where, body in self.requests if where == path]

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        dev = path.startswith(("/pause", "/resume", "/is_paused", "/collective_rpc", "/reset_prefix_cache"))
        if dev and self.manner == "no_dev":
            return 404, {"detail": "Not Found"}
        if path == "/v1/models":
            return 200, {"data": [{"id": "tiny", "owned_by": "vllm", "max_model_len": self.window}]}
        if path == "/tokenize":
            return 200, {"tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]}
        if path == "/v1/completions":
            return self.complete(body)
        if path == "/collective_rpc":
            return self.load(body)
        if path == "/reset_prefix_cache":
            return 200, {"success": self.manner != "keeps_cache"}
        if dev:
            return 200, {"is_paused": False}
        return 404, {"detail": "Not Found"}

    def load(self, body: Any) -> tuple[int, Any]:
        assert body["method"] == "reload_weights"
        if self.manner == "refuses":
            return 500, {"error": {"message": "Cannot find any model weights"}}
        self.loaded += 1
        if self.manner != "stale":
            weights = load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors")
            missing = self.model.load_state_dict(weights, strict=False)
            assert not missing.unexpected_keys
        return 200, {"results": [None]}

    def complete(self, body: Any) -> tuple[int, Any]:
        if self.manner == "busy" and self.busy:
            self.busy -= 1
            return 503, {"error": {"message": "starting"}}
        if self.manner == "gone" and self.loaded > 1:
            return 503, {"error": {"message": "no engine"}}
        ids, logps, reason = self.sampled(body)
        choice = {
            "finish_reason": reason,
            "logprobs": {"token_logprobs": [x + self.shift for x in logps]},
            "token_ids": ids,
            "prompt_token_ids": body["prompt"],
        }
        if self.manner == "no_ids":
            choice.pop("token_ids")
        return 200, {"choices": [choice]}

    @torch.no_grad()
    def sampled(self, body: Any) -> tuple[list[int], list[float], str]:
        generator = torch.Generator().manual_seed(body["seed"] % 2**63)
        ids: list[int] = []
        logps: list[float] = []
        stops = [body["prompt"][0]] if self.manner == "own_stop" else body["stop_token_ids"]
        while len(ids) < (body["max_tokens"] if self.manner != "own_stop" else 2):
            distribution = self.model(torch.tensor([[*body["prompt"], *ids]])).logits[0, -1].float()
            tempered = (distribution / body["temperature"]).softmax(-1)
            ids.append(int(torch.multinomial(tempered, 1, generator=generator)))
            logps.append(float(distribution.log_softmax(-1)[ids[-1]]))
            if ids[-1] in stops:
                return ids, logps, "stop"
        return ids, logps, "stop" if self.manner == "own_stop" else "length"


class _Handler(BaseHTTPRequestHandler):
    owner: RolloutServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        """Silence."""

    def do_GET(self) -> None:
        self.send(self.path, None)

    def do_POST(self) -> None:
        self.send(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def send(self, path: str, body: Any) -> None:
        path = path.split("?")[0]
        with self.owner.lock:
            self.owner.requests.append((path, body))
            status, value = self.owner.answer(path, body)
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if status == 503:
            self.send_header("Retry-After", "0.01")
        self.end_headers()
        self.wfile.write(text)
