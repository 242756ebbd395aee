"""A server that hands out hidden states is a teacher with whole rows: its numbers here, or a refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support.tokenizers_zoo as zoo
import torch
from safetensors.torch import load_file
from support import tiny
from support.teacher_server import STATES, TeacherServer

from diglot.batches import PackedSide, pack
from diglot.errors import TeacherError, TeacherUnavailable
from diglot.heads import Branches
from diglot.objectives import Level
from diglot.rendering import Conversation, Renderer
from diglot.teachers import LocalTeacher
from diglot.teachers.readout import Readout, load_readout
from diglot.teachers.served import ServedTeacher
from diglot.teachers.served_rows import ServedRows
from diglot.teachers.serving import connect_server
from diglot.trainers.gkd import GKDTrainer

RENDERER = Renderer(zoo.turns(), name="teacher")
TEXTS = ("hello", "one two three, as you asked", "naïve café 数学", "x = 1\n")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    tiny.tiny_model(zoo.turns(), 1).save_pretrained(tmp_path / "weights")
    zoo.turns().save_pretrained(tmp_path / "weights")
    return tmp_path / "weights"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[TeacherServer]:
    endpoint = TeacherServer(tiny.tiny_model(zoo.turns(), 1), zoo.turns())
    endpoint.states = tmp_path / "states"
    endpoint.states.mkdir()
    yield endpoint.start()
    endpoint.stop()


def connect(server: TeacherServer, weights: Path, **options: Any) -> ServedTeacher:
    load: Callable[[], Readout] = lambda: load_readout(str(weights))  # noqa: E731
    return connect_server(server.url, RENDERER, load_readout=load, **{"timeout": 2.0, "budget": 2.0, **options})


def rows_of(server: TeacherServer, weights: Path) -> ServedRows:
    teacher = connect(server, weights)
    assert isinstance(teacher, ServedRows) and teacher.level == Level.HIDDEN
    return teacher


def side(*texts: str) -> PackedSide:
    read = [
        RENDERER.render(Conversation(({"role": "user", "content": f"Say it:{i}"},)), t) for i, t in enumerate(texts)
    ]
    return pack(read, [1] * len(read), RENDERER.stop_id)


def left(server: TeacherServer) -> list[Path]:
    assert server.states is not None
    return sorted(server.states.iterdir())


def test_whole_rows_are_those_of_the_same_model_here(server: TeacherServer, weights: Path) -> None:
    teacher, local, of = rows_of(server, weights), LocalTeacher(server.model, RENDERER), side(*TEXTS)
    there, here = teacher.head(teacher.hidden(of)).log_softmax(-1), local.head(local.hidden(of)).log_softmax(-1)
    assert len(there) == len(of.rows) > 20
    torch.testing.assert_close(there, here, atol=2e-4, rtol=0)


def test_rows_behind_branches_are_those_of_the_same_model_here(server: TeacherServer, weights: Path) -> None:
    teacher, local, of = rows_of(server, weights), LocalTeacher(server.model, RENDERER), side(*TEXTS)
    after = of.rows.numpy()[[1, 1, 7, 7]]
    branches = Branches(np.array([40, 41, 50, 60]), after, np.array([0, 1, 0, 0]))
    torch.testing.assert_close(teacher.behind(of, branches), local.behind(of, branches), atol=2e-4, rtol=0)


def test_no_log_probs_are_asked_for_and_the_last_token_is_not_sent(server: TeacherServer, weights: Path) -> None:
    teacher, of = rows_of(server, weights), side("hello")
    server.requests.clear()
    teacher.hidden(of)
    (body,) = server.requests
    assert "prompt_logprobs" not in body and body["max_tokens"] == 1
    assert body["prompt"] == of.input_ids[0, : int(of.rows[-1]) + 1].tolist()


def test_files_are_removed_once_they_are_read_and_nothing_else_is(server: TeacherServer, weights: Path) -> None:
    assert server.states is not None
    (server.states / "mine.safetensors").write_bytes(b"not an answer")
    rows_of(server, weights).hidden(side(*TEXTS))
    assert [path.name for path in left(server)] == ["mine.safetensors"]


def test_a_file_that_is_still_being_written_is_waited_for(server: TeacherServer, weights: Path) -> None:
    teacher, of = rows_of(server, weights), side("hello")
    expected = teacher.hidden(of)
    server.latency = 0.2
    torch.testing.assert_close(teacher.hidden(of), expected, atol=0, rtol=0)


@pytest.mark.parametrize("config", [
    dict(tie_word_embeddings=True), dict(tie_word_embeddings=False), dict(rms_norm_eps=0.3),
], ids=str)  # fmt: skip
def test_norm_and_head_are_read_from_the_weights_alone(tmp_path: Path, config: dict[str, Any]) -> None:
    model = tiny.tiny_model(zoo.turns(), 3, **config)
    model.model.norm.weight.data.uniform_(0.5, 2)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    readout, states = load_readout(str(tmp_path)), torch.randn(5, 32)
    torch.testing.assert_close(readout.head(readout.hidden(states)), model.lm_head(model.model.norm(states)))
    assert not any(p.requires_grad for p in (*readout.norm.parameters(), *readout.head.module.parameters()))


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="No model is described at"):
        load_readout(str(tmp_path))
    tiny.tiny_model(zoo.turns(), 3).config.save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match=r"There is no model\.norm\.weight in safetensors files"):
        load_readout(str(tmp_path))


# ---- what the probe finds --------------------------------------------------------------------------------------------


def test_a_server_without_hidden_states_gives_the_likeliest_ids(server: TeacherServer, weights: Path) -> None:
    server.states = None
    teacher = connect(server, weights)
    assert not isinstance(teacher, ServedRows) and teacher.level == Level.TOP_K


def test_states_on_another_machine_are_not_used_and_the_log_says_so(
    server: TeacherServer, weights: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "write_states", lambda folder, ids: "/not-on-this-machine/a.safetensors")
    assert connect(server, weights).level == Level.TOP_K
    assert "that folder is not on this machine" in caplog.text and "shared_storage_path" in caplog.text


def test_states_of_another_layer_are_refused(server: TeacherServer, weights: Path) -> None:
    server.layer = 0
    with pytest.raises(TeacherError, match=r"nats a token from those that it gives itself.*layer_ids"):
        connect(server, weights)


def test_weights_of_another_model_are_refused(server: TeacherServer, tmp_path: Path) -> None:
    tiny.tiny_model(zoo.turns(), 9).save_pretrained(tmp_path / "other")
    with pytest.raises(TeacherError, match="the weights here are another model's"):
        connect(server, tmp_path / "other")


def test_weights_that_are_not_beside_the_tokenizer_leave_the_likeliest_ids(
    server: TeacherServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert connect(server, tmp_path).level == Level.TOP_K
    assert "hands out hidden states, and they are not used: No model is described at" in caplog.text


# ---- what goes wrong later -------------------------------------------------------------------------------------------

WRONG = {
    "unfinite": (TeacherError, "hidden state at token .* not finite"),
    "other_ids": (TeacherError, "are about .* ids that are not"),
    "short": (TeacherError, "expected .*layers, 32"),
    "narrow": (TeacherError, "expected .*layers, 32"),
    "unnamed": (TeacherError, "named no file of hidden states"),
    "truncated": (TeacherUnavailable, "no whole file.*asked 2 times"),
    "absent": (TeacherUnavailable, "were not there in .*asked 2 times"),
    "link": (TeacherUnavailable, "were not there in .*asked 2 times"),
}


@pytest.mark.parametrize("state", [s for s in STATES if s != "right"])
def test_files_that_go_wrong_during_a_run_stop_it_with_the_reason(
    server: TeacherServer, weights: Path, state: str
) -> None:
    teacher = rows_of(server, weights)
    teacher.client.timeout = 0.2
    server.state = state
    kind, words = WRONG[state]
    with pytest.raises(kind, match=words):
        teacher.hidden(side("hello"))
    if state == "other_ids":  # somebody else's answer stays where it is
        (path,) = [p for p in left(server) if p.suffix == ".safetensors"]
        assert "hidden_states" in load_file(path)


# ---- training --------------------------------------------------------------------------------------------------------


def first_loss(trainer: GKDTrainer) -> float:
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("objective", ["auto", "strict", "byte"])
def test_the_default_objective_and_others_of_whole_rows_train_as_with_the_teacher_here(
    server: TeacherServer, weights: Path, tmp_path: Path, objective: str
) -> None:
    common: dict[str, Any] = dict(objective=objective, lmbda=0.0, max_steps=1)
    here = tiny.gkd(tmp_path / "here", zoo.chatml(), zoo.turns(), **common)
    models = tiny.tiny_model(zoo.chatml(), 0), None
    own = dict(teacher_model_name_or_path=server.url, teacher_tokenizer_name_or_path=str(weights))
    there = tiny.gkd(tmp_path / "there", zoo.chatml(), zoo.turns(), models=models, **common, **own)
    name = "covering" if objective == "auto" else objective
    assert [t.name for t in there.comparisons[0].terms] == [t.name for t in here.comparisons[0].terms] == [name]
    assert first_loss(there) == pytest.approx(first_loss(here), abs=2e-4)
