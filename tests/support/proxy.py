"""The proxy on loopback in a thread, in front of a tiny teacher, and contexts in a student's ids to ask it about."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import support.tokenizers_zoo as zoo
import torch
from support.tiny import tiny_model

from diglot.engines import Projector, Transcript
from diglot.engines.serving.app import Proxy, Settings
from diglot.engines.serving.run import make_server
from diglot.engines.serving.scorer import Scorer
from diglot.engines.serving.upstream import LocalUpstream, ServedUpstream
from diglot.rendering import Conversation, Renderer

STUDENT, TEACHER = Renderer(zoo.chatml(), name="student"), Renderer(zoo.inst(), name="teacher")
MODEL = tiny_model(zoo.inst(), seed=5)


def context(text: str = "Say hello, naïve 数学!", question: str = "Well?", stop: bool = True) -> list[int]:
    """A prompt and a sampled reply, in the student's ids."""
    prompt = STUDENT.prompt_ids(Conversation(({"role": "user", "content": question},)))
    reply = STUDENT.encoder.encode([text])[0].ids
    return [*prompt.tolist(), *reply.tolist(), *([STUDENT.stop_id] if stop else [])]


def expected(ids: list[int], question: str, length: int) -> list[float | None]:
    """What must come back for a context: the model's own numbers, with nothing of the proxy in between."""
    transcript = Transcript.of_completion([{"role": "user", "content": question}], ids[length:])
    projector = Projector(STUDENT, TEACHER)
    reading = projector.read(transcript)
    with torch.no_grad():
        rows = MODEL(torch.from_numpy(reading.teacher_ids)[None]).logits[0].log_softmax(-1)
    own = rows[:-1].gather(-1, torch.from_numpy(reading.teacher_ids[1:, None]))[:, 0].double().numpy()
    from diglot.engines import TeacherScores

    result = projector.project(reading, TeacherScores(np.append(0.0, own)))
    assert result.valid.all()
    return [None] * length + result.logps.tolist()


def proxy(upstream: Any = None, settings: Settings | None = None, **scorer: Any) -> Proxy:
    """One in front of the tiny model, or of `upstream`."""
    upstream = upstream or LocalUpstream(MODEL)
    return Proxy(Scorer(Projector(STUDENT, TEACHER), upstream, **scorer), settings or Settings())


def served(url: str, budget: float = 20.0) -> ServedUpstream:
    """A teacher's server behind the proxy."""
    return ServedUpstream.connect(url, TEACHER, model=None, concurrency=8, timeout=10.0, budget=budget, max_length=None)


@contextmanager
def listening(one: Proxy) -> Iterator[str]:
    """Its address, while it answers."""
    server = make_server(one, "127.0.0.1", 0)
    socket = server.config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
            assert thread.is_alive()
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        socket.close()
