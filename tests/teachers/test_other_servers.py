"""Servers that cannot be teachers, for real: llama.cpp's and `transformers serve`, on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import support.tokenizers_zoo as zoo
import torch
from support import tiny
from support.gguf_file import write_gguf

from diglot.errors import TeacherError
from diglot.http.client import Client
from diglot.rendering import Renderer
from diglot.teachers.loading import load_teacher_model
from diglot.teachers.serving import connect_server
from diglot.teachers.wire import VLLM, Asking, ServerInfo

IDS = list(range(5, 30))
LLAMA_SERVER = Path(__file__).parents[1] / "support" / "llama_server.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher as a GGUF file, and in a hub's cache."""
    root = tmp_path_factory.mktemp("teacher")
    model, tokenizer = tiny.tiny_model(zoo.inst(), 1, tie_word_embeddings=False), zoo.inst()
    write_gguf(root / "tiny.gguf", model, tokenizer)
    cached = root / "hub" / "models--tiny--teacher"
    for save in (model.save_pretrained, tokenizer.save_pretrained):
        save(cached / "snapshots" / "0")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0")
    return root


@contextmanager
def process(arguments: list[str], **variables: str) -> Iterator[Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with subprocess.Popen([sys.executable, *arguments], env=environment, **pipes) as started:
        try:
            yield started
        finally:
            started.kill()


@pytest.fixture(scope="module")
def llama(folder: Path) -> Iterator[str]:
    with process(
        [str(Path(__file__).parents[1] / "support" / "llama_server.py"), str(folder / "tiny.gguf")]
    ) as started:
        address = next((line.strip() for line in started.stdout if line.startswith("http")), None)
        assert address is not None, "llama.cpp's server did not start"
        yield address


@pytest.fixture(scope="module")
def serve(folder: Path) -> Iterator[str]:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = ["-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1", "--port", port, "--device", "cpu"]
    with process(words, HF_HUB_CACHE=str(folder / "hub")) as started:
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while True:
            assert started.poll() is None and time.monotonic() < until, "transformers serve did not start"
            try:
                httpx.get(f"{url}/health")
                break
            except httpx.TransportError:
                time.sleep(0.5)
        yield url


def test_llama_cpp_is_refused_with_what_to_do_instead(llama: str) -> None:
    with pytest.raises(TeacherError, match=r"is llama\.cpp's server.* or load the GGUF file as a local teacher"):
        connect_server(llama, Renderer(zoo.inst(), name="teacher"))


def test_llama_cpp_is_refused_behind_a_proxy_that_hides_its_name(llama: str) -> None:
    """It ignores that log-probs were asked for, and answers 200."""
    with closing(Client(llama)) as client, pytest.raises(TeacherError, match="left out prompt_logprobs"):
        VLLM(ServerInfo("any", None)).score(client, IDS, Asking(top=8))


def test_a_teacher_out_of_a_gguf_file_has_the_distribution_of_llama_cpp(llama: str, folder: Path) -> None:
    """To a hundredth of a nat: llama.cpp keeps keys and values in float16."""
    model = load_teacher_model(str(folder / "tiny.gguf"), {"dtype": "float32"})
    with torch.no_grad():
        distribution = model(torch.tensor([IDS])).logits[0, -1].log_softmax(-1)
    requests = {"prompt": IDS, "n_predict": 1, "n_probs": 10, "temperature": -1.0}
    answer = httpx.post(f"{llama}/completion", json=requests).json()["completion_probabilities"][0]
    theirs = {one["id"]: one["logprob"] for one in answer["top_logprobs"]}
    assert len(theirs) == 10 and set(theirs) == set(distribution.topk(10).indices.tolist())
    np.testing.assert_allclose([distribution[i] for i in theirs], list(theirs.values()), atol=1e-2)


@pytest.mark.real
def test_transformers_serve_is_refused(serve: str) -> None:
    """It lists the model, has no /tokenize, and takes no request for log-probs of a given text."""
    with pytest.raises(TeacherError, match=r"does not take what a teacher is asked .*prompt_logprobs.*vLLM does"):
        connect_server(serve, Renderer(zoo.inst(), name="teacher"), model="tiny/teacher")
