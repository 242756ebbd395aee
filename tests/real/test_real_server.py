"""A real vLLM server on loopback: its log-probs are those of transformers, and a student learns from it the same way.

`make test-server` installs the server (demo/vllm_server.py) and runs this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support.tokenizers_zoo as zoo
import torch
import vllm_server
from assets import fetch_texts
from support import tiny
from support.real_assets import model_folder, tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from diglot.batches import PackedSide, pack
from diglot.errors import TeacherError
from diglot.heads import Branches, token_logps
from diglot.rendering import Conversation, Renderer
from diglot.teachers import LocalTeacher
from diglot.teachers.readout import load_readout
from diglot.teachers.served_rows import ServedRows
from diglot.teachers.serving import connect_server

pytestmark = [pytest.mark.real, pytest.mark.server]
MODEL = "smollm2-135m-instruct"


@contextmanager
def started(log: Path, *more: str, **variables: str) -> Iterator[str]:
    """A server that answers; its address."""
    if not (vllm_server.environment() / "complete").exists():
        pytest.fail("vLLM is not installed. Run `make test-server`, which installs it.")
    with vllm_server.running(model_folder(MODEL), log, *more, **variables) as result:
        yield result


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with started(tmp_path_factory.mktemp("vllm") / "server.log") as result:
        yield result


@lru_cache
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_folder(MODEL), dtype=torch.float32).eval()


@lru_cache
def renderer() -> Renderer:
    config = GenerationConfig.from_pretrained(model_folder(MODEL))
    rows = model().get_input_embeddings().num_embeddings  # type: ignore[union-attr]
    return Renderer(tokenizer("smollm2"), num_embeddings=rows, generation_config=config, name="teacher")


def texts() -> PackedSide:
    rows = fetch_texts("gsm8k", "heldout")[:6]
    questions = [Conversation(({"role": "user", "content": row["question"][:300]},)) for row in rows]
    read = [renderer().render(one, row["answer"][:300]) for one, row in zip(questions, rows, strict=True)]
    return pack(read, [1] * len(read), renderer().stop_id)


def test_logprobs_of_vllm_are_those_of_transformers(url: str) -> None:
    """Both in float32: to 1e-3 nats at every token of 6 worked answers, stop included; the likeliest ids too."""
    teacher, side = connect_server(url, renderer()), texts()
    teacher.want(16)
    result, local = teacher.scores(side), LocalTeacher(model(), renderer())
    hidden = local.hidden(side)
    expected = token_logps(hidden, local.head, side.targets, side.stop, renderer().stop_ids, 64)
    assert len(expected) > 300 and side.stop.any()
    torch.testing.assert_close(result.text(True), expected, atol=1e-3, rtol=0)
    best = local.head(hidden).log_softmax(-1).topk(16)
    torch.testing.assert_close(result.top_logps, best.values, atol=1e-3, rtol=0)
    assert (result.top_ids[:, 0] == best.indices[:, 0]).float().mean() > 0.99
    teacher.close()


def test_hidden_states_of_vllm_give_the_rows_of_transformers(tmp_path: Path) -> None:
    """Both in float32: every log-prob above -20 of 300 rows to 2e-4 nats, and of rows behind a branch."""
    states, place = tmp_path / "states", model_folder(MODEL)
    states.mkdir()
    options = vllm_server.hidden_states(place, states)
    with started(tmp_path / "server.log", *options, **vllm_server.STATES_VARIABLES) as url:
        teacher = connect_server(url, renderer(), load_readout=lambda: load_readout(str(place)))
        assert isinstance(teacher, ServedRows)
        local, side = LocalTeacher(model(), renderer()), texts()
        branches = Branches(np.array([300, 301, 400]), side.rows.numpy()[[2, 2, 90]], np.array([0, 1, 0]))
        pairs = (
            (teacher.hidden(side), local.hidden(side)),
            (teacher.behind(side, branches), local.behind(side, branches)),
        )
        for served, here in pairs:
            result, expected = teacher.head(served).log_softmax(-1), local.head(here).log_softmax(-1)
            assert float((result - expected)[expected > -20].abs().max()) < 2e-4
        assert len(side.rows) > 300 and not list(states.iterdir())
        teacher.close()


def test_another_tokenizer_is_refused(url: str) -> None:
    with pytest.raises(TeacherError, match="The server's tokenizer is not the teacher's"):
        connect_server(url, Renderer(tokenizer("qwen3"), name="teacher"))


def test_more_likeliest_ids_than_the_server_gives_are_refused(url: str) -> None:
    teacher = connect_server(url, renderer())
    with pytest.raises(TeacherError, match="--max-logprobs 65"):
        teacher.want(65)
    teacher.close()


def test_a_text_beyond_the_window_is_refused_with_both_lengths(url: str) -> None:
    teacher = connect_server(url, renderer())
    read = renderer().render(Conversation(None, "Count:"), " one" * 600)
    teacher.max_length = None  # as if the server had not said
    with pytest.raises(TeacherError, match=r"text of 60\d tokens .*maximum context length is 512"):
        teacher.scores(pack([read], [1], renderer().stop_id))
    teacher.close()


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (tiny.gkd, dict(objective="span", lmbda=1.0)),
        (tiny.gkd, dict(lmbda=0.5)),
        (tiny.minillm, dict(num_iterations=2)),
    ],
    ids=["gkd-span", "gkd-top_k", "minillm"],
)
def test_a_student_learns_from_the_server_as_from_the_model(
    url: str, tmp_path: Path, make: Any, options: dict[str, Any]
) -> None:
    """Another tokenizer's student; three steps of plain gradient descent."""
    students = []
    for teacher in (url, model()):
        own = dict(options, optim="sgd", learning_rate=0.02, max_steps=3, max_completion_length=24)
        if teacher is not url and make is tiny.minillm:
            own |= dict(teacher_mixed_alpha=0.0, single_step_decomposition=False)
        if teacher is not url and "objective" not in own and make is tiny.gkd:
            own |= dict(objective="top_k")
        start = tiny.tiny_model(zoo.chatml(), 0)
        before = tiny.parameters(start)
        trainer = make(tmp_path, zoo.chatml(), tokenizer("smollm2"), tiny.CHAT_ROWS, models=(start, teacher), **own)
        trainer.train()
        students.append(tiny.parameters(trainer.model))
    moved = max(float((before[n] - p).abs().max()) for n, p in students[0].items())
    apart = max(float((students[0][n] - p).abs().max()) for n, p in students[1].items())
    assert apart < 0.01 * moved and moved > 1e-4


def test_logits_instead_of_logprobs_are_refused(tmp_path: Path) -> None:
    """vLLM can be started so that it gives those (--logprobs-mode raw_logits)."""
    reason = r"add up to|expected a finite number of at most 0"
    with (
        started(tmp_path / "server.log", "--logprobs-mode", "raw_logits") as other,
        pytest.raises(TeacherError, match=reason),
    ):
        connect_server(other, renderer())
