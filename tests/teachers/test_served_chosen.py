"""A server that scores chosen ids: the student's own likeliest and the stop set, exactly, in one form of request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
import torch
from support import tiny
from support.teacher_server import CHOSEN, TeacherServer

from diglot.batches import PackedSide, pack
from diglot.errors import TeacherError
from diglot.heads import token_logps
from diglot.objectives import Level
from diglot.rendering import Conversation, Renderer
from diglot.teachers import LocalTeacher
from diglot.teachers.served_chosen import ServedChosen
from diglot.teachers.serving import connect_server

RENDERER = Renderer(zoo.turns(), name="teacher")
TEXTS = ("hello", "one two three, as you asked", "naïve café 数学", "x = 1\n")


@pytest.fixture
def server() -> Iterator[TeacherServer]:
    endpoint = TeacherServer(tiny.tiny_model(zoo.turns(), 1), zoo.turns())
    endpoint.scale_out = True
    yield endpoint.start()
    endpoint.stop()


def connect(server: TeacherServer) -> ServedChosen:
    teacher = connect_server(server.url, RENDERER, timeout=2.0, budget=2.0)
    assert isinstance(teacher, ServedChosen) and teacher.level == Level.CHOSEN
    return teacher


def side(*texts: str) -> PackedSide:
    read = [
        RENDERER.render(Conversation(({"role": "user", "content": f"Say it:{i}"},)), t) for i, t in enumerate(texts)
    ]
    return pack(read, [1] * len(read), RENDERER.stop_id)


def test_chosen_ids_have_the_log_probs_of_the_same_model_here(server: TeacherServer) -> None:
    teacher, local, of = connect(server), LocalTeacher(server.model, RENDERER), side(*TEXTS)
    torch.manual_seed(0)
    token = torch.randint(0, len(of.rows), (40,))  # in no order, several of one row
    ids = torch.randint(0, server.vocabulary, (40,))
    rows = local.head(local.hidden(of)).log_softmax(-1)
    torch.testing.assert_close(teacher.chosen(of, token, ids), rows[token, ids], atol=2e-4, rtol=0)


@pytest.mark.parametrize("stop_as_set", [True, False])
def test_the_text_and_the_whole_stop_set_take_one_request_a_text(server: TeacherServer, stop_as_set: bool) -> None:
    teacher, local, of = connect(server), LocalTeacher(server.model, RENDERER), side(*TEXTS)
    assert len(RENDERER.stop_ids) > 1 and of.stop.any()
    server.requests.clear()
    answer = teacher.ask(of, stop_as_set).result()
    stop = of.stop if stop_as_set else torch.zeros_like(of.stop)
    expected = token_logps(local.hidden(of), local.head, of.targets, stop, RENDERER.stop_ids, 64)
    torch.testing.assert_close(answer.text(stop_as_set), expected, atol=2e-4, rtol=0)
    assert len(server.requests) == len(TEXTS)


def test_rows_of_the_prompt_are_not_asked_for(server: TeacherServer) -> None:
    teacher, of = connect(server), side("hello")
    server.requests.clear()
    teacher.ask(of).result()
    (body,) = server.requests
    sampling = body["sampling_params"]
    assert sampling["prompt_logprob_start"] == int(of.rows[0]) > 3
    assert len(sampling["prompt_logprob_token_ids"]) == len(of.rows)


def test_the_likeliest_ids_are_still_given_where_an_objective_wants_them(server: TeacherServer) -> None:
    teacher, local, of = connect(server), LocalTeacher(server.model, RENDERER), side("hello")
    teacher.want(5)
    best = local.head(local.hidden(of)).log_softmax(-1).topk(5)
    torch.testing.assert_close(teacher.ask(of).result().top_logps, best.values, atol=2e-4, rtol=0)


def test_a_server_without_the_route_gives_the_likeliest_ids(server: TeacherServer) -> None:
    server.scale_out = False
    assert connect_server(server.url, RENDERER, timeout=2.0, budget=2.0).level == Level.TOP_K


def test_a_server_that_ignores_the_ids_gives_the_likeliest_ids(server: TeacherServer) -> None:
    server.choice = "ignores"
    assert connect_server(server.url, RENDERER, timeout=2.0, budget=2.0).level == Level.TOP_K


def test_rows_one_position_late_are_refused_at_the_start(server: TeacherServer) -> None:
    server.choice = "late"
    with pytest.raises(TeacherError, match=r"expected (at most|\(|a finite)"):
        connect(server)


@pytest.mark.parametrize(("choice", "words"), [
    ("nan", "expected a finite number of at most 0"),
    ("infinite", "expected a finite number of at most 0"),
    ("positive", "is 0.5, expected a finite number"),
    ("ignores", "has no prompt_token_id_logprobs"),
    ("other_ids", "that are not the .* that were sent"),
    ("rows", "Rows are missing"),
    ("float64", "of float64 in"),
    ("truncated", "no whole .npy file|expected .* of float32"),
    ("pickle", "of object in"),
])  # fmt: skip
def test_answers_that_go_wrong_during_a_run_stop_it_with_the_reason(
    server: TeacherServer, choice: str, words: str
) -> None:
    assert choice in CHOSEN
    teacher, of = connect(server), side("hello")
    server.choice = choice
    with pytest.raises(TeacherError, match=words):
        teacher.chosen(of, torch.tensor([0, 1]), torch.tensor([5, 6]))
    with pytest.raises(TeacherError, match=words):
        teacher.ask(of).result()


def test_the_students_own_likeliest_train_as_with_the_teacher_here(server: TeacherServer, tmp_path: Path) -> None:
    """`strict` reads ids that the student names after its pass; loss and step are those of the local teacher."""
    common: dict[str, Any] = dict(objective="strict", strict_top_k=4, lmbda=0.0, max_steps=2)
    common |= dict(optim="sgd", learning_rate=0.05)
    here = tiny.gkd(tmp_path / "here", zoo.chatml(), zoo.turns(), **common)
    models = tiny.tiny_model(zoo.chatml(), 0), None
    zoo.turns().save_pretrained(tmp_path / "tokenizer")
    own = dict(teacher_model_name_or_path=server.url, teacher_tokenizer_name_or_path=str(tmp_path / "tokenizer"))
    there = tiny.gkd(tmp_path / "there", zoo.chatml(), zoo.turns(), models=models, **common, **own)
    for trainer in (here, there):
        trainer.train()
    logs = [[e for e in t.state.log_history if "loss" in e] for t in (here, there)]
    assert len(logs[0]) == 2
    for a, b in zip(*logs, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=2e-4)
        assert b["strict/mass_s"] == pytest.approx(a["strict/mass_s"], abs=2e-4)
    for (name, a), (_, b) in zip(here.model.named_parameters(), there.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=0, msg=name)


def test_whole_row_forms_of_strict_are_refused_with_what_works(server: TeacherServer, tmp_path: Path) -> None:
    zoo.turns().save_pretrained(tmp_path / "tokenizer")
    own = dict(teacher_model_name_or_path=server.url, teacher_tokenizer_name_or_path=str(tmp_path / "tokenizer"))
    models = tiny.tiny_model(zoo.chatml(), 0), None
    with pytest.raises(TeacherError, match="needs HIDDEN of the teacher, which offers CHOSEN"):
        tiny.gkd(tmp_path, zoo.chatml(), zoo.turns(), models=models, objective="strict", strict_top_k=0, **own)
