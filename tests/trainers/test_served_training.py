"""Training from a served teacher: the same run as with the model here, and what happens when the server goes."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
import torch
from support import tiny
from support.teacher_server import TeacherServer

from diglot.cli.main import main
from diglot.errors import ConfigError, TeacherError, TeacherUnavailable
from diglot.teachers import served


@pytest.fixture
def server() -> Iterator[TeacherServer]:
    endpoint = TeacherServer(tiny.tiny_model(zoo.turns(), 1), zoo.turns()).start()
    yield endpoint
    endpoint.stop()


@pytest.fixture(autouse=True)
def whole_stop_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the mass of stop, nothing is left out."""
    monkeypatch.setattr(served, "STOP_TOLERANCE", 0.0)


def made(make: Any, out: Path, server: TeacherServer, where: str, student: str = "chatml", **options: Any) -> Any:
    """The trainer with the teacher of `server`, "served" or "local"."""
    tokenizer = zoo.ALL[student]()
    teacher = server.url if where == "served" else server.model
    models = (tiny.tiny_model(tokenizer, 0), teacher)
    # Adam would divide rounding by rounding where a gradient is nearly zero.
    options = {"optim": "sgd", "learning_rate": 0.02, "max_steps": 3, **options}
    return make(out, tokenizer, zoo.turns(), tiny.CHAT_ROWS, models=models, **options)


def same_run(a: Any, b: Any) -> None:
    logged = [[e for e in t.state.log_history if "loss" in e] for t in (a, b)]
    assert len(logged[0]) == len(logged[1]) == 3
    for one, two in zip(*logged, strict=True):
        assert one.keys() == two.keys()
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
    for (name, p), q in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=0, msg=name)


RUNS: list[tuple[str, Any, dict[str, Any]]] = [
    ("gkd-span", tiny.gkd, dict(objective="span", lmbda=1.0)),
    ("gkd-alm", tiny.gkd, dict(objective="alm", lmbda=0.5)),
    ("gkd-top_k", tiny.gkd, dict(objective=[{"name": "top_k", "k": 12}], lmbda=0.5, beta=0.5)),
    ("gkd-sum", tiny.gkd, dict(objective=["sequence_kl", "ce", {"name": "top_k", "weight": 0.5}], lmbda=0.0)),
    ("gkd-same", tiny.gkd, dict(objective="span", lmbda=1.0, student="turns")),
    ("minillm", tiny.minillm, dict(teacher_mixed_alpha=0.0, single_step_decomposition=False, num_iterations=2)),
]


@pytest.mark.parametrize(("make", "options"), [r[1:] for r in RUNS], ids=[r[0] for r in RUNS])
def test_a_run_with_a_served_teacher_is_the_run_with_the_model_here(
    server: TeacherServer, tmp_path: Path, make: Any, options: dict[str, Any]
) -> None:
    runs = [made(make, tmp_path / where, server, where, **options) for where in ("local", "served")]
    for one in runs:
        one.train()
    assert len(server.requests) > 10
    same_run(*runs)


def test_another_teacher_gives_another_run(server: TeacherServer, tmp_path: Path) -> None:
    """The comparison above can fail."""
    local = made(tiny.gkd, tmp_path / "a", server, "local", objective="span", lmbda=1.0)
    local.train()
    server.model = tiny.tiny_model(zoo.turns(), 2)
    other = made(tiny.gkd, tmp_path / "b", server, "served", objective="span", lmbda=1.0)
    other.train()
    with pytest.raises(AssertionError):
        same_run(local, other)


@pytest.mark.parametrize(("student", "objective"), [("chatml", "span"), ("turns", "top_k")])
def test_gkd_by_itself_takes_the_objective_that_the_server_has_enough_for(
    server: TeacherServer, tmp_path: Path, student: str, objective: str
) -> None:
    trainer = made(tiny.gkd, tmp_path, server, "served", student, lmbda=0.5)
    before = tiny.parameters(trainer.model)
    trainer.train()
    assert [t.name for t in trainer.comparisons[0].terms] == [objective]
    assert any(not torch.equal(before[n], p) for n, p in trainer.model.named_parameters())


def test_minillm_by_itself_switches_off_what_the_server_cannot_give_and_says_so(
    server: TeacherServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        trainer = made(tiny.minillm, tmp_path, server, "served", num_iterations=2)
    assert [t.name for t in trainer.comparisons[0].terms] == ["policy_gradient"] and trainer.mixed_alpha == 0
    assert "single-step part is off" in caplog.text and "teacher_mixed_alpha is 0" in caplog.text
    trainer.train()
    assert all(math.isfinite(e["reverse_kl"]) for e in trainer.state.log_history if "reverse_kl" in e)
    with pytest.raises(ConfigError, match="rkl_advantage=False leaves"):
        made(tiny.minillm, tmp_path, server, "served", rkl_advantage=False)


def test_evaluation_is_that_of_the_model_here_but_for_what_takes_whole_rows(
    server: TeacherServer, tmp_path: Path
) -> None:
    local, other = (
        made(tiny.gkd, tmp_path / w, server, w, lmbda=1.0).evaluate(tiny.CHAT_ROWS[:4]) for w in ("local", "served")
    )
    assert set(local) - set(other) == {"eval_stop_agreement"}
    assert {k: local[k] for k in other} == pytest.approx(other, abs=1e-5)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["strict", "bpm", "byte", "dskd", [{"name": "span", "noncanonical": "boundary"}]])
def test_objectives_of_a_higher_rung_are_refused_with_those_that_work(
    server: TeacherServer, tmp_path: Path, objective: Any
) -> None:
    with pytest.raises(TeacherError, match=r"needs (HIDDEN|CHOSEN) .* offers TOP_K.*These would work: .*top_k.*span"):
        made(tiny.gkd, tmp_path / "out", server, "served", objective=objective)
    assert not (tmp_path / "out").exists()


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (tiny.gkd, dict(seq_kd=True), r"seq_kd .* needs the teacher's model in this process, and the teacher is tiny at"),
    (tiny.gkd, dict(teacher_cache_dir="cache"), "teacher_cache_dir .* needs the teacher's model"),
    (tiny.gkd, dict(kd_temperature=2.0), "kd_temperature=2.0 has no part in objective 'span'"),
    (tiny.gkd, dict(kd_temperature=2.0, objective="top_k"), "kd_temperature=2.0 needs whole rows"),
    (tiny.minillm, dict(kd_temperature=2.0), "kd_temperature=2.0 needs whole rows"),
    (tiny.gkd, dict(objective=[{"name": "top_k", "k": 65}]), "--max-logprobs 65"),
    (tiny.gkd, dict(teacher_model_init_kwargs={"dtype": "auto"}), "is for a teacher that is loaded here"),
    (tiny.gkd, dict(teacher_model_server_url="http://127.0.0.1:9"), "are two addresses|two teachers"),
]


@pytest.mark.parametrize(("make", "options", "reason"), REFUSED, ids=[r[2][:20] for r in REFUSED])
def test_options_that_a_served_teacher_cannot_follow_are_refused(
    server: TeacherServer, tmp_path: Path, make: Any, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises((ConfigError, TeacherError), match=reason):
        made(make, tmp_path, server, "served", **options)


def test_a_tokenizer_that_is_not_named_is_an_error(server: TeacherServer, tmp_path: Path) -> None:
    tokenizer = zoo.chatml()
    with pytest.raises(TeacherError, match=r"does not say what its tokenizer is.*teacher_tokenizer_name_or_path"):
        tiny.gkd(tmp_path, tokenizer, None, models=(tiny.tiny_model(tokenizer), server.url))  # type: ignore[arg-type]


# ---- when the server goes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options"),
    [(tiny.gkd, dict(lmbda=1.0)), (tiny.minillm, dict(num_iterations=2))],
    ids=["gkd", "minillm"],
)
def test_a_server_that_goes_leaves_a_checkpoint_from_which_the_run_goes_on_exactly(
    server: TeacherServer, tmp_path: Path, make: Any, options: dict[str, Any]
) -> None:
    keywords: dict[str, Any] = dict(options, objective="span", teacher_server_retry_seconds=0.5)
    through = made(make, tmp_path / "a", server, "served", **keywords)
    through.train()
    broken = made(make, tmp_path / "b", server, "served", **keywords)
    window, prepare = 0, broken.prepare

    def prepare_until_it_goes(batches: Any) -> Any:
        nonlocal window
        window += 1
        if window == 3:
            server.stop()
            broken.comparisons[0].teacher.client._http.close()
            broken.comparisons[0].teacher.client = served.Client(server.url, timeout=0.5, budget=0.3)
        return prepare(batches)

    broken.prepare = prepare_until_it_goes
    with pytest.raises(TeacherUnavailable, match=rf"{server.url} gave no answer.*checkpoint-2"):
        broken.train()
    server.start()
    resumed = made(make, tmp_path / "b", server, "served", **keywords)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    for p, q in zip(through.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


SECRET = "sk-do-not-tell-4711"


def test_the_key_is_in_no_file_and_no_line_that_a_run_leaves(
    server: TeacherServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A whole run of the command line with an evaluation and a checkpoint, and one that fails."""
    server.key = SECRET
    monkeypatch.setenv("DIGLOT_TEACHER_API_KEY", SECRET)
    for name, tokenizer in (("student", zoo.chatml()), ("teacher", zoo.turns())):
        tiny.save(tmp_path / name, tokenizer)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.CHAT_ROWS), encoding="utf-8")
    command = (
        f"train --model_name_or_path {tmp_path / 'student'} --teacher_model_name_or_path {server.url} "
        f"--teacher_tokenizer_name_or_path {tmp_path / 'teacher'} --dataset_name {tmp_path / 'data.jsonl'} "
        "--trainer gkd --max_steps 2 --save_steps 1 --use_cpu --max_completion_length 4 "
        "--per_device_train_batch_size 2 --disable_tqdm true"
    ).split()
    with caplog.at_level(logging.DEBUG):
        assert main([*command, "--output_dir", str(tmp_path / "run")]) == 0
        server.faults = [(500, {})] * 99
        assert main([*command, "--output_dir", str(tmp_path / "bad"), "--teacher_server_retry_seconds", "0.3"]) != 0
    printed = capfd.readouterr()
    assert (tmp_path / "run" / "resolved_config.yaml").read_text().count(server.url) == 1
    assert SECRET not in printed.out + printed.err + caplog.text
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]
    assert server.url in printed.err


# ---- overlap ---------------------------------------------------------------------------------------------------------


def test_the_student_works_while_the_teacher_answers(server: TeacherServer, tmp_path: Path) -> None:
    """The server answers nothing until the student has read its first micro-batch, and has all requests by then."""
    trainer = made(tiny.gkd, tmp_path, server, "served", student="turns", objective="alm", lmbda=0.0)
    rows = [trainer.data_collator(tiny.CHAT_ROWS[i : i + 2]) for i in range(0, 8, 2)]
    server.held, server.most_under_way = threading.Event(), 0
    batches = trainer.get_batch_samples(iter(rows), 4, trainer.args.device)[0]
    hook = trainer.student.register_forward_hook(lambda *_: server.held.set())
    decoder = trainer.student.get_decoder().register_forward_hook(lambda *_: server.held.set())
    for batch in batches:
        trainer.compute_loss(trainer.model, batch).backward()
    hook.remove(), decoder.remove()
    assert server.held.is_set() and server.gave_up_waiting == 0
    assert server.most_under_way > 1
