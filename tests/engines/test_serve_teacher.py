"""`diglot serve-teacher` as a process: with a model of its own, before TRL's client, and ended while it works."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import support.tokenizers_zoo as zoo
from support.proxy import MODEL, STUDENT, Conversation, context, expected
from support.teacher_server import TeacherServer

from diglot.cli.main import main

ASK = "Well?"
LENGTH = len(STUDENT.prompt_ids(Conversation(({"role": "user", "content": ASK},))))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    zoo.chatml().save_pretrained(root / "student")
    zoo.inst().save_pretrained(root / "teacher")
    MODEL.save_pretrained(root / "teacher")
    return {"student": str(root / "student"), "teacher": str(root / "teacher")}


@contextmanager
def process(log: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The command, and the address that it says it listens on."""
    command = [sys.executable, "-m", "diglot", "serve-teacher", "--port", "0", *arguments]
    with log.open("wb") as out:
        started = subprocess.Popen(command, stderr=out, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    try:
        while (result := re.search(r"listening on (http://\S+)", log.read_text("utf-8"))) is None:
            assert started.poll() is None, log.read_text("utf-8")
            time.sleep(0.05)
        yield started, result.group(1)
    finally:
        started.kill()
        started.wait()


def check(entries: list[Any], ids: list[int]) -> None:
    result = [None if e is None else e[str(i)]["logprob"] for i, e in zip(ids, entries, strict=True)]
    assert result == [r if r is None else pytest.approx(r, abs=2e-4) for r in expected(ids, ASK, LENGTH)]


def test_trls_own_client_gets_the_teachers_numbers(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """TRL 1.16.0's client of `ServerDistillationTrainer`; vLLM itself is not needed for what it does over HTTP."""
    client_module = pytest.importorskip("trl.generation.vllm_client", reason="needs TRL, which wants Python 3.11")
    monkeypatch.setattr(client_module, "is_vllm_available", lambda: True)
    pair = ["--student", folders["student"], "--teacher", folders["teacher"], "--dtype", "float32"]
    with process(tmp_path / "log", *pair) as (_, url):
        client = client_module.VLLMClient(base_url=url, connection_timeout=10.0)
        texts = [context(), context("one two three, as you asked.")]
        result = client.get_sequence_logprobs(texts, [LENGTH, LENGTH], top_logprobs=4)
        for k, ids in enumerate(texts):
            actual = [one[0] for one in result["actual_logprobs"][k]]
            assert actual == [pytest.approx(r, abs=2e-4) for r in expected(ids, ASK, LENGTH)[LENGTH:]]
            assert [one[0] for one in result["actual_token_ids"][k]] == ids[LENGTH:]


def test_what_was_accepted_is_answered_after_sigterm(folders: dict[str, str], tmp_path: Path) -> None:
    server = TeacherServer(MODEL, zoo.inst()).start()
    served = ["--teacher", server.url, "--teacher_tokenizer", folders["teacher"]]
    ids, answers = context(), list[httpx.Response]()
    try:
        with process(tmp_path / "log", "--student", folders["student"], *served) as (started, url):
            server.held = threading.Event()
            body = {"prompt": ids, "max_tokens": 1, "prompt_logprobs": 0}
            ask = lambda: answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=30))  # noqa: E731
            threads = [threading.Thread(target=ask) for _ in range(6)]
            for thread in threads:
                thread.start()
            while server.under_way < 6:
                threads[0].join(0.01)
            started.send_signal(signal.SIGTERM)
            threads[0].join(0.5)
            assert started.poll() is None
            with pytest.raises(httpx.TransportError):
                httpx.get(f"{url}/health")
            server.held.set()
            for thread in threads:
                thread.join()
            assert started.wait(20) in (0, -signal.SIGTERM)
    finally:
        server.stop()
    assert len(answers) == 6
    for answer in answers:
        check(answer.json()["choices"][0]["prompt_logprobs"], ids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher", "http://127.0.0.1:9"], "--teacher_tokenizer"),
        (["--teacher", "TEACHER", "--host", "0.0.0.0"], "DIGLOT_PROXY_API_KEY"),
        (["--teacher", "TEACHER", "--credit", "best"], "no credit rule 'best'"),
        (["--teacher", "x", "--queue", "0"], "--queue is 0"),
        (["--teacher", "x", "--credit", "gap"], "--credit gap shares the difference to the student's own log-probs"),
        (["--teacher", "x", "--port", "70000"], "--port is 70000, expected 0 to 65535"),
        (["--teacher", "x", "--timeout", "nan"], "--timeout is nan, expected a number of seconds above 0"),
        (["--teacher", "x", "--retry_seconds", "-1"], "--retry_seconds is -1.0"),
        (["--teacher", "x", "--served_model_name", ""], "--served_model_name is empty"),
        (["--teacher", "TEACHER", "--port", "TAKEN"], "cannot be listened on: Address already in use"),
        (["--teacher", "x", "--unscored", "two"], "--unscored"),
        (["--teacher", "./nope"], "The teacher is './nope' (--teacher), and there is no such folder."),
        (["--teacher", "nope/x"], "The teacher is 'nope/x' (--teacher), and there is no folder of this name"),
        (["--teacher", "TEACHER", "--student", "./nope"], "The student is './nope' (--student), and there is"),
        (
            ["--teacher", "http://127.0.0.1:9", "--teacher_tokenizer", "./nope"],
            "The teacher's tokenizer is './nope' (--teacher_tokenizer), and there is",
        ),
    ],
)
def test_mistakes_are_told_in_one_message(
    arguments: list[str], message: str, folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        places = {"TEACHER": folders["teacher"], "TAKEN": str(taken.getsockname()[1])}
        words = [places.get(word, word) for word in arguments]
        assert main(["serve-teacher", "--student", folders["student"], *words]) == 2
    assert message in capsys.readouterr().err


def test_a_server_that_cannot_be_a_teacher_is_refused_at_the_start(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    server = TeacherServer(MODEL, zoo.inst())
    server.manner = "late"
    server.start()
    try:
        arguments = ["--teacher", server.url, "--teacher_tokenizer", folders["teacher"]]
        assert main(["serve-teacher", "--student", folders["student"], *arguments]) == 2
        assert "Serve the model with vLLM or SGLang" in capsys.readouterr().err
    finally:
        server.stop()
