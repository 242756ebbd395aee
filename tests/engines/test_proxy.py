"""A teacher in the ids of a student with another tokenizer, behind the forms of vLLM and SGLang."""

from __future__ import annotations

import asyncio
import math
import socket
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest
import support.tokenizers_zoo as zoo
from support import proxy as made
from support.proxy import MODEL, STUDENT, context, expected, listening
from support.teacher_server import TeacherServer

from diglot.engines.serving.app import Settings
from diglot.engines.serving.forms import Limits
from diglot.errors import ConfigError

ASK = "Well?"
LENGTH = len(STUDENT.prompt_ids(made.Conversation(({"role": "user", "content": ASK},))))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with listening(made.proxy()) as result:
        yield result


def vllm(url: str, prompt: Any, top: int = 0, **more: Any) -> httpx.Response:
    body = {"model": "teacher", "prompt": prompt, "max_tokens": 1, "prompt_logprobs": top, **more}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=30)


def sglang(url: str, ids: Any, **more: Any) -> httpx.Response:
    body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 0}, "return_logprob": True, **more}
    return httpx.post(f"{url}/generate", json=body, timeout=30)


def own_logps(response: httpx.Response, ids: list[int], choice: int = 0) -> list[float | None]:
    entries = response.json()["choices"][choice]["prompt_logprobs"]
    return [None if e is None else e[str(i)]["logprob"] for i, e in zip(ids, entries, strict=True)]


def close(result: list[float | None], right: list[float | None]) -> None:
    assert [f is None for f in result] == [r is None for r in right]
    assert result == [r if r is None else pytest.approx(r, abs=2e-4) for r in right]


def test_vllms_form_gives_the_teachers_numbers_for_the_students_tokens(url: str) -> None:
    ids = context()
    close(own_logps(vllm(url, ids), ids), expected(ids, ASK, LENGTH))


def test_sglangs_form_gives_the_same(url: str) -> None:
    ids = context()
    rows = sglang(url, ids, top_logprobs_num=3).json()["meta_info"]
    assert [row[1] for row in rows["input_token_logprobs"]] == ids
    close([row[0] for row in rows["input_token_logprobs"]], expected(ids, ASK, LENGTH))
    named = [k for k, row in enumerate(rows["input_top_logprobs"]) if row is not None]
    assert named and all(rows["input_token_logprobs"][k][0] is not None for k in named)
    assert all(len(rows["input_top_logprobs"][k]) <= 3 for k in named)
    later = sglang(url, ids, logprob_start_len=LENGTH).json()["meta_info"]["input_token_logprobs"]
    assert [row[1] for row in later] == ids[LENGTH:]


def test_vllms_form_for_ids_alone_gives_the_same_with_the_written_id_first(url: str) -> None:
    """As prime-rl asks and reads it: the first value of each entry."""
    ids = context()
    body = {"model": "teacher", "token_ids": ids, "sampling_params": {"max_tokens": 1, "prompt_logprobs": 4}}
    entries = httpx.post(f"{url}/inference/v1/generate", json=body, timeout=30).json()["prompt_logprobs"]
    assert all(next(iter(e)) == str(i) for i, e in zip(ids, entries, strict=True) if e)
    close([None if e is None else next(iter(e.values()))["logprob"] for e in entries], expected(ids, ASK, LENGTH))


def test_several_texts_of_one_request_keep_their_order(url: str) -> None:
    texts = [context("Say hello"), context("one two three " * 5), context("数学", stop=False)]
    result = vllm(url, texts)
    assert [choice["index"] for choice in result.json()["choices"]] == [0, 1, 2]
    for k, ids in enumerate(texts):
        close(own_logps(result, ids, k), expected(ids, ASK, LENGTH))
    answers = sglang(url, texts).json()
    assert [len(a["meta_info"]["input_token_logprobs"]) for a in answers] == [len(ids) for ids in texts]


def test_rows_with_likeliest_ids_are_ranked_and_hold_no_more_mass_than_there_is(url: str) -> None:
    ids = context("Say hello to the children, one two three.")
    entries = vllm(url, ids, top=5).json()["choices"][0]["prompt_logprobs"]
    more = 0
    for i, entry in list(zip(ids, entries, strict=True))[LENGTH:]:
        assert str(i) in entry
        ranked = sorted(entry.values(), key=lambda one: one["rank"])
        assert [one["rank"] for one in ranked] == [*range(1, len(ranked) + 1)]
        assert all(a["logprob"] >= b["logprob"] for a, b in pairwise(ranked))
        assert sum(math.exp(one["logprob"]) for one in ranked) <= 1 + 1e-6
        more += len(entry) > 1
    assert more > 5


def test_a_context_of_several_turns_is_scored_in_all_of_them(url: str) -> None:
    second = STUDENT.encoder.encode_markup("\n<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\n").tolist()
    reply = STUDENT.encoder.encode(["Yes."])[0].ids.tolist()
    first = context()
    result = own_logps(vllm(url, ids := [*first, *second, *reply, STUDENT.stop_id]), ids)
    valid = [i for i, logp in enumerate(result) if logp is not None]
    assert valid == [*range(LENGTH, len(first)), *range(len(first) + len(second), len(ids))]


def test_what_is_not_scored_is_null_or_the_number_that_was_chosen_and_counted() -> None:
    half = next(i for i in range(300) if STUDENT.vocabulary.token(i) == "数".encode()[:1])
    ids = [*context(stop=False), half]
    with listening(made.proxy(settings=Settings(unscored=0.0))) as url:
        rows = sglang(url, ids).json()["meta_info"]
    assert rows["input_token_logprobs"][0][0] is None and rows["input_token_logprobs"][-1][0] == 0.0
    assert rows["diglot"]["scored_tokens"] == len(ids) - LENGTH - 1


def test_what_every_client_needs_beside_scores(url: str) -> None:
    ids = context()
    vllm(url, ids)
    assert httpx.get(f"{url}/health").status_code == 200 and httpx.get(f"{url}/ready").status_code == 200
    one = httpx.get(f"{url}/v1/models").json()["data"][0]
    assert one["id"] == "teacher" and one["max_model_len"] > 0
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    counted = {line.split(" ")[0]: float(line.split(" ")[1]) for line in lines if not line.startswith("#")}
    assert counted['diglot_proxy_requests_total{path="/v1/completions",status="200"}'] >= 1
    assert counted["diglot_proxy_scored_tokens_total"] >= len(ids) - LENGTH
    assert counted["diglot_proxy_requests_under_way"] == 0


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/completions", b"", 400, "no JSON"),
        ("/v1/completions", b"\xff\xfe{", 400, "no JSON"),
        ("/v1/completions", DEEP.encode(), 400, "no JSON"),
        ("/v1/completions", b'{"prompt": ' + b"9" * 5000 + b"}", 400, "no JSON"),
        ("/v1/completions", b"[1, 2]", 400, "a JSON list, expected an object"),
        ("/v1/completions", b'{"prompt": [1], "prompt_logprobs": 0, "max_tokens": 5}', 400, "max_tokens is 5"),
        ("/v1/completions", b'{"prompt": [1]}', 400, "prompt_logprobs is missing"),
        ("/v1/completions", b'{"prompt": "text", "prompt_logprobs": 0}', 400, "prompt is str, expected a list"),
        ("/v1/completions", b'{"prompt": [], "prompt_logprobs": 0}', 400, "prompt is empty"),
        ("/v1/completions", b'{"prompt": [[1], 2], "prompt_logprobs": 0}', 400, "Text 1 of prompt is int"),
        ("/v1/completions", b'{"prompt": [[1], []], "prompt_logprobs": 0}', 400, "Text 1 of prompt is empty"),
        ("/v1/completions", b'{"prompt": [[1, 9], [5]], "prompt_logprobs": 0}', 400, "Text .: Position"),
        ("/v1/completions", b'{"prompt": [1, true], "prompt_logprobs": 0}', 400, "True, expected token ids"),
        ("/v1/completions", b'{"prompt": [1, 2.5], "prompt_logprobs": 0}', 400, "2.5, expected token ids"),
        ("/v1/completions", b'{"prompt": [1, 99999999999], "prompt_logprobs": 0}', 400, "expected token ids"),
        ("/v1/completions", b'{"prompt": [1, 419000], "prompt_logprobs": 0}', 400, "Position 1: id 419000 is not in"),
        ("/v1/completions", b'{"prompt": [5, 6], "prompt_logprobs": 0}', 400, "Position 0: .* begins a conversation"),
        (
            "/v1/completions",
            b'{"prompt": [1], "prompt_logprobs": 99}',
            400,
            "prompt_logprobs is 99, expected .* 0 to 20",
        ),
        ("/v1/completions", b'{"prompt": [1], "prompt_logprobs": 0, "lora": 1}', 400, "does not know lora"),
        (
            "/v1/completions",
            b'{"prompt": [1], "prompt_logprobs": 0, "stream": true}',
            400,
            "stream is True.*only scores",
        ),
        ("/v1/completions", b'{"prompt": [1], "prompt_logprobs": 0, "n": true}', 400, "n is True.*only scores"),
        ("/v1/completions", b'{"prompt": [1], "prompt_logprobs": 0, "max_tokens": 1.0}', 400, "max_tokens is 1.0"),
        ("/v1/completions", b'{"prompt": [1], "prompt_logprobs": "0"}', 400, "prompt_logprobs is '0'"),
        ("/v1/completions", b'{"\\ud800": 1}', 400, r"does not know .ud800"),
        ("/v1/completions", b'{"' + b"k" * 100_000 + b'": 1}', 400, "does not know k{40}[.]"),
        ("/v1/completions", b'{"max_tokens": "\\ud800"}', 400, "max_tokens is '.ud800'"),
        (
            "/inference/v1/generate",
            b'{"token_ids": [1], "sampling_params": {"prompt_logprobs": 0, "prompt": [2]}}',
            400,
            "does not know sampling_params.prompt",
        ),
        ("/generate", b'{"input_ids": [1], "return_logprob": true, "sampling_params": ""}', 400, "is a str"),
        (
            "/generate",
            b'{"input_ids": [1], "return_logprob": true, "top_logprobs_num": ""}',
            400,
            "top_logprobs_num is ''",
        ),
        ("/generate", b'{"input_ids": [1], "return_logprob": true, "logprob_start_len": 2}', 400, "from 0 to 1"),
        ("/v1/completions", b'{"model": "x", "prompt": [1], "prompt_logprobs": 0}', 404, "'x' does not exist"),
        ("/generate", b'{"input_ids": [1]}', 400, "return_logprob true"),
        ("/generate", b'{"input_ids": [1], "return_logprob": true, "sampling_params": 3}', 400, "is a int"),
        ("/generate", b'{"text": "hi", "return_logprob": true}', 400, "does not know text"),
    ],
)
def test_a_hostile_or_mistaken_body_is_refused_with_a_reason(
    url: str, path: str, body: bytes, status: int, message: str
) -> None:
    import re

    result = httpx.post(url + path, content=body)
    assert result.status_code == status and re.search(message, result.json()["error"]["message"]), result.text
    ids = context()
    close(own_logps(vllm(url, ids), ids), expected(ids, ASK, LENGTH))


def test_bodies_are_bounded_one_by_one_and_together() -> None:
    small = Settings(body_bytes=2000, queued_bytes=5000, body_seconds=0.5, limits=Limits(tokens=100, texts=2))
    with listening(made.proxy(settings=small)) as url:
        assert httpx.post(f"{url}/generate", content=b" " * 2001).status_code == 413
        streamed = httpx.post(f"{url}/generate", content=(b" " * 100 for _ in range(50)))
        assert streamed.status_code == 413
        assert vllm(url, [1] * 101).status_code == 400 and vllm(url, [[1]] * 3).status_code == 400
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
            assert slow.recv(100).startswith(b"HTTP/1.1 408")
        assert vllm(url, context("hi")).status_code == 200


def test_a_full_queue_is_answered_429_with_a_time_and_nothing_is_lost() -> None:
    server = TeacherServer(MODEL, zoo.inst()).start()
    try:
        upstream = made.served(server.url)
        server.held = threading.Event()
        ids = context()
        with listening(made.proxy(upstream, Settings(queued=3))) as url:
            answers: list[httpx.Response] = []
            threads = [threading.Thread(target=lambda: answers.append(vllm(url, ids))) for _ in range(3)]
            for thread in threads:
                thread.start()
            _wait(lambda: server.under_way == 3)
            refused = vllm(url, ids)
            assert refused.status_code == 429 and float(refused.headers["Retry-After"]) > 0
            assert httpx.get(f"{url}/ready").status_code == 503 and httpx.get(f"{url}/health").status_code == 200
            server.held.set()
            for thread in threads:
                thread.join()
            assert [a.status_code for a in answers] == [200] * 3 and vllm(url, ids).status_code == 200
    finally:
        server.stop()


def _wait(happened: Any, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.parametrize("form", ["vllm", "sglang"])
def test_a_served_teacher_gives_what_the_local_one_gives(form: str) -> None:
    server = TeacherServer(MODEL, zoo.inst())
    server.form = form
    server.start()
    try:
        with listening(made.proxy(made.served(server.url))) as url:
            ids = context()
            close(own_logps(vllm(url, ids, top=4), ids), expected(ids, ASK, LENGTH))
    finally:
        server.stop()


def test_passing_faults_of_the_teachers_server_are_asked_over_and_its_refusal_is_passed_on() -> None:
    server = TeacherServer(MODEL, zoo.inst()).start()
    try:
        with listening(made.proxy(made.served(server.url))) as url:
            ids = context()
            server.faults = ["reset", "truncated", (500, {}), (429, {})]
            close(own_logps(vllm(url, ids), ids), expected(ids, ASK, LENGTH))
            server.faults = [(400, {})]
            assert vllm(url, ids).status_code == 502
            server.manner = "nan"
            assert "nan" in vllm(url, ids).json()["error"]["message"]
    finally:
        server.stop()


class _Answering:
    """In the place of the connection to a teacher's server: one answer, or a server that never comes to an end."""

    def __init__(self, body: bytes | None) -> None:
        self.body = body

    async def post(self, path: str, json: Any) -> httpx.Response:
        if self.body is None:
            await asyncio.sleep(60)
        return httpx.Response(200, content=self.body)

    async def aclose(self) -> None:
        """Nothing is open."""


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{bad}", 502, "200 to a text of .* 5 bytes that are no JSON: b'{bad}'"),
        (b'{"a": "\xff"}', 502, "that are no JSON"),
        (b"[" * 100_000 + b"}", 502, "that are no JSON"),
        (b"{}", 502, "no choices"),
        (b"<html>", 503, "a 200 that is cut or no JSON"),
        (None, 503, "TimeoutError"),
    ],
)
def test_a_teachers_server_that_answers_nonsense_or_never_ends_is_named_as_the_cause(
    body: bytes | None, status: int, message: str
) -> None:
    """A server that sends a byte now and then keeps every read short: an attempt as a whole has its bound."""
    import re

    server = TeacherServer(MODEL, zoo.inst()).start()
    upstream = made.served(server.url, budget=0.05)
    server.stop()
    upstream.timeout, upstream._http = 0.1, _Answering(body)  # type: ignore[assignment]
    with listening(made.proxy(upstream)) as url:
        result = vllm(url, context("hi"))
    assert result.status_code == status and re.search(message, result.json()["error"]["message"]), result.text


def test_when_one_text_of_a_request_is_refused_the_others_are_not_asked_about() -> None:
    """The request is answered and counts no more: what it left behind would be work that no bound holds."""
    server = TeacherServer(MODEL, zoo.inst()).start()
    try:
        upstream = made.served(server.url)
        server.held = threading.Event()
        with listening(made.proxy(upstream, concurrency=1)) as url:
            before = len(server.requests)
            assert vllm(url, [context("hi"), [5, 6], *[context(f"{k}") for k in range(8)]]).status_code == 400
            server.held.set()
            assert vllm(url, context("later")).status_code == 200
            assert len(server.requests) - before <= 2
    finally:
        server.stop()


def test_a_teacher_that_is_gone_gives_503_and_one_that_comes_back_is_used_again() -> None:
    server = TeacherServer(MODEL, zoo.inst()).start()
    upstream = made.served(server.url, budget=0.3)
    with listening(made.proxy(upstream)) as url:
        ids = context()
        assert vllm(url, ids).status_code == 200
        server.stop()
        gone = vllm(url, ids)
        assert (
            gone.status_code == 503 and "Retry-After" in gone.headers and httpx.get(f"{url}/ready").status_code == 503
        )
        server.start()
        close(own_logps(vllm(url, ids), ids), expected(ids, ASK, LENGTH))
        server.stop()


def test_a_teacher_that_is_killed_and_restarted_within_the_budget_costs_no_request() -> None:
    server = TeacherServer(MODEL, zoo.inst()).start()
    ids = context()
    with listening(made.proxy(made.served(server.url))) as url:
        server.stop()
        answers: list[httpx.Response] = []
        threads = [threading.Thread(target=lambda: answers.append(vllm(url, ids))) for _ in range(10)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        server.start()
        for thread in threads:
            thread.join()
        for answer in answers:
            close(own_logps(answer, ids), expected(ids, ASK, LENGTH))
        assert len(answers) == 10
        server.stop()


def test_the_key_is_needed_for_all_but_health(monkeypatch: pytest.MonkeyPatch) -> None:
    from diglot.engines.serving.run import KEY_VARIABLE, check_host, key_for_clients

    monkeypatch.setenv(KEY_VARIABLE, "secret")
    with listening(made.proxy(settings=Settings(key=key_for_clients()))) as url:
        for path in ("/metrics", "/v1/models"):
            assert httpx.get(url + path).status_code == 401
        assert vllm(url, context()).status_code == 401 and httpx.get(f"{url}/health").status_code == 200
        wrong, right = ({"Authorization": f"Bearer {key}"} for key in ("secreT", "secret"))
        assert httpx.get(f"{url}/v1/models", headers=wrong).status_code == 401
        assert httpx.get(f"{url}/v1/models", headers=right).status_code == 200
    check_host("127.0.0.1", None)
    check_host("0.0.0.0", "secret")
    for host in ("0.0.0.0", "::", "example.org"):
        with pytest.raises(ConfigError, match=KEY_VARIABLE):
            check_host(host, None)
    monkeypatch.setenv(KEY_VARIABLE, "two\nlines")
    with pytest.raises(ConfigError, match="no HTTP header"):
        key_for_clients()


async def _load(url: str, seconds: float, together: int) -> tuple[int, int]:
    """So many clients at once, each with texts of its own; counts of right answers and of those asked over."""
    texts = [context(f"{k} says {'hello ' * (k % 7)}数{k * k}", f"{ASK} {k}") for k in range(together)]
    lengths = [
        len(STUDENT.prompt_ids(made.Conversation(({"role": "user", "content": f"{ASK} {k}"},))))
        for k in range(together)
    ]
    right = [expected(ids, f"{ASK} {k}", lengths[k]) for k, ids in enumerate(texts)]
    until, done, again = time.monotonic() + seconds, 0, 0
    limits = httpx.Limits(max_connections=together, max_keepalive_connections=together)

    async with httpx.AsyncClient(limits=limits, timeout=120) as client:

        async def one(k: int) -> None:
            nonlocal done, again
            while True:
                body = {"prompt": texts[k], "max_tokens": 1, "prompt_logprobs": 0}
                response = await client.post(f"{url}/v1/completions", json=body)
                if response.status_code == 429:
                    again += 1
                    await asyncio.sleep(0.05)
                    continue
                assert response.status_code == 200, response.text
                close(own_logps(response, texts[k]), right[k])
                done += 1
                if time.monotonic() > until:
                    return

        await asyncio.gather(*(one(k) for k in range(together)))
    return done, again


def test_under_load_no_request_is_lost_wrong_or_mixed_up() -> None:
    """200 clients at once; more than the queue takes, so some are asked to come again."""
    with listening(made.proxy(settings=Settings(queued=150))) as url:
        done, again = asyncio.run(_load(url, 2.0, 200))
    assert done >= 200 and again > 0


HOSTILE: list[bytes] = [
    b"", b"{", b"[" * 100_000, b'{"prompt": [1e400]}', b'{"prompt": [NaN], "prompt_logprobs": 0}', b"\xff\xfe\x00",
    b'{"prompt": [99999999], "prompt_logprobs": 0, "max_tokens": 1}', b'{"prompt": "text", "prompt_logprobs": 0}',
]  # fmt: skip


async def _disturb(url: str, server: TeacherServer, seconds: float) -> int:
    """Bodies that are no requests, and a teacher that is killed and started again, until the time is over; how often
    it was."""
    until, killed = time.monotonic() + seconds, 0
    async with httpx.AsyncClient(timeout=60) as client:
        while time.monotonic() < until:
            for body in HOSTILE:
                status = (await client.post(f"{url}/v1/completions", content=body)).status_code
                assert status in (400, 413, 429), (body[:40], status)
            await asyncio.to_thread(server.stop)
            await asyncio.sleep(0.5)
            server.start()
            killed += 1
            await asyncio.sleep(5.0)
    return killed


@pytest.mark.nightly
def test_under_load_for_a_minute() -> None:
    """200 clients at once, bodies that are no requests, a teacher that is killed and restarted: all answers right."""
    server = TeacherServer(MODEL, zoo.inst()).start()

    async def both(url: str) -> tuple[tuple[int, int], int]:
        return await asyncio.gather(_load(url, 60.0, 200), _disturb(url, server, 50.0))

    try:
        with listening(made.proxy(made.served(server.url, budget=60.0), settings=Settings(queued=250))) as url:
            (done, _), killed = asyncio.run(both(url))
            text = httpx.get(f"{url}/metrics").text
    finally:
        server.stop()
    assert done >= 1000 and killed >= 3
    assert "diglot_proxy_requests_under_way 0.0" in text
