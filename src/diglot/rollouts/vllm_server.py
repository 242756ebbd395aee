"""Completions by vLLM's own OpenAI server, which takes new weights from a checkpoint in a folder that both can see.

Needs vLLM's endpoints for development (`VLLM_SERVER_DEV_MODE=1`): `/pause`, `/collective_rpc` with `reload_weights`,
`/reset_prefix_cache`, `/resume`. Whoever can reach the server can then use them too: keep it on a private network.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import PreTrainedModel

from diglot.arrays import Ids
from diglot.errors import ConfigError, RolloutError, RolloutsUnavailable, TeacherError
from diglot.http.client import Client, Purpose, Refused, answers_of
from diglot.rendering import Renderer
from diglot.rollouts.draws import seeds_of_rows
from diglot.rollouts.engine import Completion
from diglot.rollouts.vllm_wire import Sampling, read, request
from diglot.rollouts.weights import WeightsFolder
from diglot.teachers.probe import TEXT
from diglot.teachers.wire import VLLM, ServerInfo

KEY_VARIABLE = "DIGLOT_VLLM_API_KEY"
PURPOSE = Purpose("vLLM's server", "vllm_server_timeout", KEY_VARIABLE, RolloutsUnavailable)
_AT_A_TIME = 64  # requests; the server has its own queue
_ENTRY_BYTES, _FIXED_BYTES = 512, 2**20  # of an answer, at most
_START = "Start it with VLLM_SERVER_DEV_MODE=1 in its environment (tested with vLLM 0.32.0)."


class VLLMServer:
    """The engine of `vllm_mode: server`.

    Args:
        client: the connection.
        sampling: the trainer's own temperature, nucleus and stop set.
        weights: where checkpoints for the server are written; the server sees it under the same name.

    Use `connect`, which looks at the server first.
    """

    own_weights = True
    elsewhere = True

    def __init__(self, client: Client, model: str, sampling: Sampling, weights: WeightsFolder) -> None:
        self.client, self.model, self.sampling, self.weights = client, model, sampling, weights
        self._pool = ThreadPoolExecutor(_AT_A_TIME, thread_name_prefix="diglot-rollouts")
        self._whole_head: bool | None = None
        weakref.finalize(self, client.close)

    @classmethod
    def connect(
        cls,
        url: str,
        renderer: Renderer,
        sampling: Sampling,
        weights: WeightsFolder,
        *,
        max_length: int | None,
        timeout: float,
    ) -> VLLMServer:
        """The engine at `url` (as `checked_address` gives it), after a look at it.

        Raises:
            ConfigError: its window is shorter than `max_length`.
            RolloutError: it reads other tokens than `renderer`, or has no endpoints for new weights.
            RolloutsUnavailable: it does not answer within `timeout` seconds.
        """
        client = Client(url, connections=_AT_A_TIME, timeout=timeout, budget=timeout, purpose=PURPOSE)
        try:
            model, window = _served(_send(client, "GET", "/v1/models"), url)
            if max_length is not None and window is not None and window < max_length:
                raise ConfigError(
                    f"max_length is {max_length} tokens, and the server at {url} takes {window}. Start it with "
                    f"--max-model-len {max_length}, or lower max_length."
                )
            _check_tokenizer(client, renderer, model, window)
            _send(client, "GET", "/is_paused", advice=_START)
        except BaseException:
            client.close()
            raise
        return cls(client, model, sampling, weights)

    def sync(self, model: PreTrainedModel) -> None:
        """Write the weights, have the server load them in place, and drop what it kept of the old ones."""
        if self._whole_head is None:
            self._whole_head = self._needs_whole_head(model)
        with self.weights.holding(model, whole_head=self._whole_head) as folder:
            self._post("/pause?mode=abort")
            try:
                # A load that fails ends the engine: asking again would only wait for a server that is gone.
                what = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
                self._post("/collective_rpc", what, once=True)
            except RolloutError as error:
                raise RolloutError(
                    f"{error} The server did not load the student's weights from {folder}. It must see this folder "
                    "under this name (vllm_weights_dir) and serve a model of the student's architecture; its own log "
                    "says more. It has to be started again."
                ) from None
            done = self._post("/reset_prefix_cache")
            if not (isinstance(done, dict) and done.get("success")):
                raise RolloutError(
                    f"{self.client.url} keeps keys and values of the old weights: /reset_prefix_cache answered {done}, "
                    "expected success. Is somebody else using the server? It must be this run's alone."
                )
            self._post("/resume")

    def write(
        self, model: PreTrainedModel, prompts: Sequence[Ids], *, max_new_tokens: int, seed: int | Sequence[int]
    ) -> list[Completion]:
        """As `RolloutEngine.write`. `model` is not used: the server has the weights of the last `sync`."""
        requests = [
            self._pool.submit(self._one, prompt, max_new_tokens, own)
            for prompt, own in zip(prompts, seeds_of_rows(seed, len(prompts)), strict=True)
        ]
        try:
            return answers_of(requests)
        except BaseException:
            self.client.break_off()
            raise

    def break_off(self) -> None:
        """Repeat no request that is under way."""
        self.client.break_off()

    def close(self) -> None:
        """Break off requests and let go of the connections; the server stays."""
        self.client.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.weights.clear()

    def _one(self, prompt: Ids, max_new_tokens: int, seed: int) -> Completion:
        limit = _FIXED_BYTES + _ENTRY_BYTES * (len(prompt) + max_new_tokens)
        body = request(self.model, prompt, self.sampling, max_new_tokens, seed)
        return read(self._post("/v1/completions", body, limit=limit), prompt, self.sampling, max_new_tokens)

    def _post(self, path: str, body: Any = None, **how: Any) -> Any:
        return _send(self.client, "POST", path, body if body is not None else {}, **how)

    def _needs_whole_head(self, model: PreTrainedModel) -> bool:
        """On a CPU vLLM computes logits with a packed copy of a tied head, which a reload leaves as it was."""
        if not getattr(model.config, "tie_word_embeddings", False) or not _on_cpu(self.client):
            return False
        sums = self._post("/weight_checker", {"action": "checksum"})
        names = sums.get("checksums", {}) if isinstance(sums, dict) else {}
        if any("lm_head" in name for name in names):
            return True
        raise RolloutError(
            f"{self.client.url} runs on a CPU and serves a model whose output head is its embedding. vLLM (0.32.0) "
            "would go on with the old head after new weights were loaded. Serve a copy with a head of its own: "
            "python demo/vllm_server.py untie FOLDER COPY."
        )


def _send(client: Client, method: str, path: str, body: Any = None, advice: str = "", **how: Any) -> Any:
    """The server's answer. What is wrong with it is a `RolloutError`, with `advice`."""
    try:
        return client.get(path) if method == "GET" else client.post(path, body, **how)
    except Refused as error:
        raise RolloutError(f"{error} {advice or (_START if error.status == 404 else '')}".strip()) from None
    except TeacherError as error:
        raise RolloutError(str(error)) from None


def _served(listed: Any, url: str) -> tuple[str, int | None]:
    """Name and window of the model that is served; adapters stand behind it in the list."""
    models = [m for m in listed.get("data", []) if isinstance(m, dict)] if isinstance(listed, dict) else []
    if not models:
        raise RolloutError(f"{url} serves no model. Start it with the student: vllm serve STUDENT.")
    window = models[0].get("max_model_len")
    return str(models[0].get("id")), window if isinstance(window, int) else None


def _check_tokenizer(client: Client, renderer: Renderer, model: str, window: int | None) -> None:
    ours = [int(i) for i in renderer.tokenizer(TEXT, add_special_tokens=False)["input_ids"]]
    theirs = VLLM(ServerInfo(model, window)).tokenize(client, TEXT)
    if theirs is not None and theirs != ours:
        raise RolloutError(
            f"The server at {client.url} has another tokenizer than the student: a text that is {len(ours)} tokens "
            f"here is {len(theirs)} there, {ours[:5]} ... and {theirs[:5]} ... Serve the student itself."
        )


def _on_cpu(client: Client) -> bool:
    try:
        about = client.get("/server_info")
    except TeacherError:
        return False
    return "device_config=cpu" in str(about)
