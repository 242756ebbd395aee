"""A served teacher says what the same model says here, and a server that does not is refused with the reason."""

from __future__ import annotations

import logging
import math
import runpy
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
import torch
from support import tiny
from support.teacher_server import MANNERS, TeacherServer

from diglot.batches import PackedSide, pack
from diglot.errors import ConfigError, TeacherError, TeacherUnavailable
from diglot.heads import token_logps
from diglot.http import client
from diglot.http.address import checked_address
from diglot.http.client import Client
from diglot.rendering import Conversation, Renderer
from diglot.teachers import LocalTeacher, served
from diglot.teachers.served import ServedTeacher
from diglot.teachers.serving import connect_server

RENDERER = Renderer(zoo.turns(), name="teacher")
TEXTS = ("hello", "one two three, as you asked", "naïve café 数学", "x = 1\n")


@pytest.fixture
def server() -> Iterator[TeacherServer]:
    endpoint = TeacherServer(tiny.tiny_model(zoo.turns(), 1), zoo.turns()).start()
    yield endpoint
    endpoint.stop()


def connect(server: TeacherServer, renderer: Renderer = RENDERER, **options: Any) -> ServedTeacher:
    return connect_server(server.url, renderer, **{"timeout": 5.0, "budget": 5.0, **options})


def side(*texts: str, prompt: str = "Say it:") -> PackedSide:
    read = [
        RENDERER.render(Conversation(({"role": "user", "content": f"{prompt}{i}"},)), t) for i, t in enumerate(texts)
    ]
    return pack(read, [1] * len(read), RENDERER.stop_id)


def expected(server: TeacherServer, of: PackedSide, stop_as_set: bool) -> torch.Tensor:
    local = LocalTeacher(server.model, RENDERER)
    stop = of.stop if stop_as_set else torch.zeros_like(of.stop)
    return token_logps(local.hidden(of), local.head, of.targets, stop, RENDERER.stop_ids, 64)


# ---- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [1, 8])
def test_served_logprobs_are_those_of_the_same_model_here(
    server: TeacherServer, monkeypatch: pytest.MonkeyPatch, top: int
) -> None:
    """Stop as the mass of the whole stop set too, whether or not its ids are among the likeliest."""
    monkeypatch.setattr(served, "STOP_TOLERANCE", 0.0)
    assert len(RENDERER.stop_ids) > 1
    teacher = connect(server)
    teacher.top = top
    of = side(*TEXTS)
    result = teacher.scores(of)
    torch.testing.assert_close(result.text(False), expected(server, of, False), atol=1e-5, rtol=0)
    torch.testing.assert_close(result.text(True), expected(server, of, True), atol=1e-5, rtol=0)
    assert (result.text(True) > result.text(False))[of.stop].all() and of.stop.any()
    teacher.close()


def test_likeliest_ids_are_those_of_the_models_rows(server: TeacherServer) -> None:
    teacher, of = connect(server), side(*TEXTS)
    teacher.want(12)
    result, local = teacher.scores(of), LocalTeacher(server.model, RENDERER)
    rows = local.head(local.hidden(of)).log_softmax(-1).topk(12)
    torch.testing.assert_close(result.top_logps, rows.values, atol=1e-5, rtol=0)
    assert (result.top_ids == rows.indices).float().mean() > 0.99  # but for ties
    teacher.close()


def test_sglangs_form_gives_the_same(server: TeacherServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against its documented answers: its server runs on no CPU of ours."""
    monkeypatch.setattr(served, "STOP_TOLERANCE", 0.0)
    server.form = "sglang"
    teacher, of = connect(server), side(*TEXTS)
    result = teacher.scores(of)
    assert teacher.wire.name == "SGLang" and all("input_ids" in body for body in server.requests)
    torch.testing.assert_close(result.text(True), expected(server, of, True), atol=1e-5, rtol=0)
    teacher.close()


@pytest.mark.parametrize("manner", ["tempered", "wrong_length", "cut"])
def test_sglangs_form_is_checked_as_well(server: TeacherServer, manner: str) -> None:
    server.form, server.manner = "sglang", manner
    with pytest.raises(TeacherError, match=REASONS[manner]):
        connect(server)


def test_llama_cpps_server_is_refused_by_its_name(server: TeacherServer) -> None:
    server.form = "llamacpp"
    with pytest.raises(TeacherError, match=r"is llama\.cpp's server, which gives log-probs of what it generates"):
        connect(server)


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(ConfigError, match=r"pip install 'diglot\[server\]'"):
        runpy.run_path(str(client.__file__))


def test_stop_ids_are_asked_for_only_where_they_could_matter(server: TeacherServer) -> None:
    """The mass of what is not asked for is below the tolerance, and is not asked for when nobody reads it."""
    teacher, of = connect(server), side("hello")
    server.requests.clear()
    teacher.ask(of, stop_as_set=False).result()
    assert len(server.requests) == 1
    teacher.scores(of)
    assert len(server.requests) >= 2
    teacher.close()


def test_ids_are_sent_and_never_text(server: TeacherServer) -> None:
    teacher = connect(server)
    teacher.scores(side(*TEXTS))
    assert all(isinstance(i, int) for body in server.requests for i in body["prompt"])
    teacher.close()


def test_requests_run_together_up_to_the_limit(server: TeacherServer) -> None:
    teacher = connect(server, concurrency=3)
    server.latency, server.most_under_way = 0.05, 0
    teacher.ask(side(*(f"text {i}" for i in range(8))), stop_as_set=False).result()
    assert server.most_under_way == 3
    teacher.close()


# ---- what is refused at the start ----------------------------------------------------------------------------------

REASONS = {
    "late": r"does not hold the token|one position late",
    "early": r"too early",
    "ignores": r"left out prompt_logprobs",
    "tempered": r"tempered .* temperature 0\.5 and 2 differs by \d",
    "top_p": r"top_p 1 and 0\.3 differs by \d",
    "cut": r"-9999\.0, which is no mass at all",
    "logits": r"add up to|expected a finite number of at most 0",
    "nan": r"is nan, expected",
    "infinite": r"no mass",
    "positive": r"is 0\.7, expected",
    "wrong_length": r"of \d+ tokens for a text of \d+",
    "other_ids": r"does not hold the token",
    "no_top": r"written token alone",
}


@pytest.mark.parametrize("manner", [m for m in MANNERS if m != "right"])
def test_a_server_whose_numbers_are_not_the_models_own_is_refused_with_the_reason(
    server: TeacherServer, manner: str
) -> None:
    server.manner = manner
    with pytest.raises(TeacherError, match=REASONS[manner]):
        connect(server)


def test_a_late_server_that_also_names_the_written_token_is_found_by_changing_it(
    server: TeacherServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its entries look right one by one: only that the distribution moves with the token it should predict gives it
    away."""
    distributions = TeacherServer.distributions

    def later(self: TeacherServer, logits: torch.Tensor, body: dict[str, Any]) -> torch.Tensor:
        return distributions(self, logits, body).roll(-1, 0)

    monkeypatch.setattr(TeacherServer, "distributions", later)
    with pytest.raises(TeacherError, match=r"one position late: .* moved by 0\.\d+"):
        connect(server)


@pytest.mark.parametrize("other", ["inst", "chatml", "unigram"])
def test_another_tokenizer_is_refused_with_the_first_difference(server: TeacherServer, other: str) -> None:
    with pytest.raises(TeacherError, match=r"token \d+ is id \d+ here, \d+ at http"):
        connect(server, Renderer(zoo.ALL[other](), name="teacher"))


def test_a_smaller_vocabulary_is_refused(server: TeacherServer) -> None:
    server.vocabulary = len(zoo.turns()) - 1
    server.tokenizer = zoo.turns()
    largest = max(i for i in range(len(RENDERER.vocabulary)) if RENDERER.vocabulary.lengths[i])
    server.vocabulary = largest
    with pytest.raises(TeacherError, match=rf"out of vocabulary|does not take id {largest}"):
        connect(server)


def test_a_window_that_holds_no_text_is_refused(server: TeacherServer) -> None:
    server.window = 6
    with pytest.raises(TeacherError, match="takes 5 tokens, too few for a text of 8"):
        connect(server)


def test_fewer_likeliest_ids_than_an_objective_reads_are_refused(server: TeacherServer) -> None:
    server.max_logprobs = 10
    teacher = connect(server)
    with pytest.raises(TeacherError, match=r"likeliest 16 ids, .*max: 10.* --max-logprobs 16"):
        teacher.want(16)
    teacher.close()


def test_no_server_at_all_is_said_within_the_budget() -> None:
    began = time.monotonic()
    with pytest.raises(TeacherUnavailable, match=r"http://127\.0\.0\.1:9 gave no answer for \d+ s of the 1 s"):
        connect_server("http://127.0.0.1:9", RENDERER, timeout=1.0, budget=1.0)
    assert time.monotonic() - began < 3


def test_a_model_that_is_not_served_is_refused_with_what_is(server: TeacherServer) -> None:
    with pytest.raises(TeacherError, match="does not serve 'large'; it serves tiny"):
        connect(server, model="large")


# ---- what goes wrong later -------------------------------------------------------------------------------------------


@pytest.fixture
def teacher(server: TeacherServer) -> Iterator[ServedTeacher]:
    result = connect(server, timeout=0.4, budget=4.0)
    server.requests.clear()
    yield result
    result.close()


@pytest.mark.parametrize(
    "fault", [(429, {"Retry-After": "0.1"}), (500, {}), (503, {}), "reset", "truncated", "slow", "drip"], ids=str
)
def test_a_passing_fault_is_tried_again_and_changes_nothing(
    server: TeacherServer, teacher: ServedTeacher, fault: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults = [fault]
    of = side("hello")
    with caplog.at_level(logging.WARNING):
        outcome = teacher.ask(of, stop_as_set=False).result()
    torch.testing.assert_close(outcome.written, expected(server, of, False), atol=1e-5, rtol=0)
    assert len(server.requests) == 2 and "again in" in caplog.text


def test_the_pause_that_a_server_asks_for_is_kept(server: TeacherServer, teacher: ServedTeacher) -> None:
    server.faults = [(429, {"Retry-After": "0.5"})]
    began = time.monotonic()
    teacher.ask(side("hello"), stop_as_set=False).result()
    assert 0.5 <= time.monotonic() - began < 1.5


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_what_the_server_has_refused_is_never_sent_again(
    server: TeacherServer, teacher: ServedTeacher, status: int
) -> None:
    server.faults = [(status, {})] * 3
    with pytest.raises(TeacherError, match=str(status)):
        teacher.ask(side("hello"), stop_as_set=False).result()
    assert len(server.requests) == 1


@pytest.mark.parametrize("fault", [(500, {}), "truncated", "reset"], ids=str)
def test_a_fault_that_stays_ends_in_a_message_within_the_budget(server: TeacherServer, fault: Any) -> None:
    teacher = connect(server, timeout=0.5, budget=0.8)
    server.faults = [fault] * 50
    began = time.monotonic()
    with pytest.raises(TeacherUnavailable, match=r"no answer for \d+ s of the 1 s .*teacher_server_retry_seconds"):
        teacher.scores(side("hello"))
    assert time.monotonic() - began < 2.5
    teacher.close()


def test_an_answer_without_end_is_cut_off(server: TeacherServer, teacher: ServedTeacher) -> None:
    server.faults = ["huge"]
    with pytest.raises(TeacherError, match=r"more than the \d+ bytes"):
        teacher.ask(side("hello"), stop_as_set=False).result()


@pytest.mark.parametrize("manner", ["nan", "wrong_length", "ignores", "cut"])
def test_numbers_that_go_wrong_during_a_run_stop_it(server: TeacherServer, teacher: ServedTeacher, manner: str) -> None:
    server.manner = manner
    with pytest.raises(TeacherError, match=REASONS[manner]):
        teacher.scores(side("hello"))


def test_a_text_beyond_the_window_is_named_with_both_lengths(server: TeacherServer) -> None:
    """Whether the server says how long its window is or only finds out."""
    server.window = 80
    for announced in (True, False):
        teacher = connect(server)
        if not announced:
            teacher.max_length = None
        with pytest.raises(TeacherError, match=r"\d{3} .*tokens.*(holds 79|length is 80).*it begins|it begins.*is 80"):
            teacher.scores(side("hello", "long " * 80))
        teacher.close()


def test_breaking_off_ends_the_waiting_and_leaves_the_teacher_usable(server: TeacherServer) -> None:
    teacher = connect(server, timeout=1.0, budget=60.0)
    server.faults = [(503, {"Retry-After": "20"})]
    pending = teacher.ask(side("hello"), stop_as_set=False)
    time.sleep(0.2)
    teacher.break_off()
    with pytest.raises(TeacherUnavailable):
        pending.result()
    assert teacher.scores(side("hello")).written.isfinite().all()
    teacher.close()


# ---- keys and addresses ----------------------------------------------------------------------------------------------

SECRET = "sk-do-not-tell-4711"


def test_the_key_comes_from_the_environment_and_is_in_no_message(
    server: TeacherServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server.key = SECRET
    with pytest.raises(TeacherError, match=r"401.*DIGLOT_TEACHER_API_KEY"):
        connect(server)
    monkeypatch.setenv("DIGLOT_TEACHER_API_KEY", SECRET)
    teacher = connect(server, budget=0.5)
    server.faults = [(500, {})] * 9  # the server's message repeats the key
    with caplog.at_level(logging.DEBUG), pytest.raises(TeacherUnavailable) as caught:
        teacher.scores(side("hello"))
    assert "***" in str(caught.value) and SECRET not in "".join(traceback.format_exception(caught.value))
    assert "attempt" in caplog.text.lower() and SECRET not in caplog.text
    server.faults = [(400, {})]
    with pytest.raises(TeacherError) as caught:
        teacher.scores(side("hello"))
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    teacher.close()


def test_a_key_that_no_header_takes_is_refused_without_being_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIGLOT_TEACHER_API_KEY", "schlüssel-4711\nX: y")
    with pytest.raises(ConfigError, match="no HTTP header takes") as caught:
        Client("http://127.0.0.1:9")
    assert "4711" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["http://me:pass4711@host:8000", "https://pass4711@host/v1", "http://host/?key=pass4711", "http://host#pass4711"],
)
def test_addresses_with_secrets_are_refused_without_being_repeated(url: str, tmp_path: Path) -> None:
    for option in ("teacher_model_name_or_path", "teacher_model_server_url"):
        with pytest.raises(ConfigError, match="DIGLOT_TEACHER_API_KEY") as caught:
            tiny.GKDConfig(output_dir=str(tmp_path / "out"), **{option: url})
        assert "pass4711" not in "".join(traceback.format_exception(caught.value))


def test_addresses_are_brought_to_one_form() -> None:
    for url in ("http://host:8000", "HTTP://host:8000/", "http://host:8000/v1", "http://host:8000/v1/"):
        assert checked_address(url, "x") == "http://host:8000"
    assert checked_address("https://[::1]:80/teachers/a", "x") == "https://[::1]:80/teachers/a"
    for url in ("ftp://host", "http://", "http://host:port"):
        with pytest.raises(ConfigError, match="HOST:PORT"):
            checked_address(url, "x")


def test_a_redirect_is_not_followed_with_the_key(server: TeacherServer, teacher: ServedTeacher) -> None:
    server.faults = [(307, {"Location": "http://127.0.0.1:9/elsewhere"})]
    with pytest.raises(TeacherError, match="was answered 307, expected 200"):
        teacher.scores(side("hello"))


def test_the_stop_tolerance_bounds_the_error(server: TeacherServer) -> None:
    """With the tolerance in force the stop set's mass is short by no more than that."""
    teacher, of = connect(server), side(*TEXTS)
    gap = expected(server, of, True) - teacher.scores(of).text(True)
    assert float(gap[of.stop].max()) <= served.STOP_TOLERANCE + 1e-5 and not math.isnan(float(gap.sum()))
    teacher.close()
