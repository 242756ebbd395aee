"""Training on completions of another engine: it has the student's weights, and its log-probs are made up for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
import torch
from support import tiny
from support.rollout_server import RolloutServer

from diglot.errors import ConfigError, RolloutError, RolloutsUnavailable
from diglot.trainers.replay import replay, save_batches


@pytest.fixture
def server() -> Iterator[RolloutServer]:
    endpoint = RolloutServer(tiny.tiny_model(zoo.chatml(), 5), zoo.chatml()).start()
    yield endpoint
    endpoint.stop()


def made(make: Any, out: Path, server: RolloutServer, **options: Any) -> Any:
    options = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 2, "max_completion_length": 6, **options}
    own = dict(use_vllm=True, vllm_server_base_url=server.url, vllm_server_timeout=5.0)
    return make(out, zoo.chatml(), zoo.turns(), tiny.PROMPT_ROWS, **{**own, **options})


GKD: dict[str, Any] = dict(objective="span", lmbda=1.0)


def logs(trainer: Any) -> list[dict[str, float]]:
    return [e for e in trainer.state.log_history if "loss" in e]


@pytest.mark.parametrize(("make", "options"), [
    (tiny.gkd, GKD), (tiny.gkd, dict(lmbda=1.0)), (tiny.minillm, dict(num_iterations=1)),
], ids=["span", "strict", "minillm"])  # fmt: skip
def test_each_step_samples_from_the_student_as_it_is_then(
    server: RolloutServer, tmp_path: Path, make: Any, options: dict[str, Any]
) -> None:
    """The server starts with other weights, and the student moves: the gap is rounding at every step."""
    trainer = made(make, tmp_path, server, **options)
    before = tiny.parameters(trainer.model)
    trainer.train()
    assert server.loaded == 2
    assert max(float((before[n] - p.detach()).abs().max()) for n, p in trainer.model.named_parameters()) > 1e-4
    for entry in logs(trainer):
        assert 0 < entry["sampling/logp_gap_max"] < 1e-4 and entry["sampling/logp_gap_mean"] < 1e-5
        assert entry["completions/mean_length"] > 0
    assert not list((tmp_path / "vllm-weights").glob("step-*"))


def test_requests_hold_ids_the_stop_set_the_trainers_distribution_and_a_seed_of_their_own(
    server: RolloutServer, tmp_path: Path
) -> None:
    trainer = made(tiny.gkd, tmp_path, server, **GKD, temperature=0.7, top_p=0.9, top_k=30, max_steps=1)
    trainer.train()
    bodies = server.bodies_of("/v1/completions")
    assert len(bodies) == 4 and len({b["seed"] for b in bodies}) == 4
    for body in bodies:
        assert all(isinstance(i, int) for i in body["prompt"]) and body["return_token_ids"]
        assert (body["temperature"], body["top_p"], body["top_k"], body["repetition_penalty"]) == (0.7, 0.9, 30, 1.0)
        assert tuple(body["stop_token_ids"]) == trainer.student_renderer.stop_ids and body["ignore_eos"]


@pytest.mark.parametrize(("make", "options"), [(tiny.gkd, GKD), (tiny.minillm, dict(num_iterations=2))])
def test_a_policy_gradient_is_weighted_by_student_over_engine_and_the_weight_is_cut(
    server: RolloutServer, tmp_path: Path, make: Any, options: dict[str, Any]
) -> None:
    """The engine says log-probs 0.5 too low: every weight is exp(0.5), and the step exp(0.5) times as long."""

    def step(where: str, shift: float, **more: Any) -> torch.Tensor:
        server.shift = shift
        plain = dict(max_grad_norm=0.0, max_steps=1)
        if make is tiny.minillm:
            plain |= dict(single_step_decomposition=False)
        trainer = made(make, tmp_path / where, server, **{**options, **plain, **more})
        before = tiny.parameters(trainer.model)
        trainer.train()
        return torch.cat([(before[n] - p).detach().flatten() for n, p in trainer.model.named_parameters()])

    one = step("a", 0.0)
    tolerance = dict(atol=1e-6, rtol=1e-3)
    assert one.abs().max() > 1e-4
    torch.testing.assert_close(step("b", -0.5), one * 2.718281828**0.5, **tolerance)
    torch.testing.assert_close(step("c", -0.5, vllm_importance_sampling_clip_max=1.25), one * 1.25, **tolerance)
    torch.testing.assert_close(step("d", -0.5, vllm_importance_sampling_correction=False), one, **tolerance)


def test_a_divergence_of_rows_is_not_weighted(server: RolloutServer, tmp_path: Path) -> None:
    results = []
    for shift in (0.0, -0.5):
        server.shift = shift
        trainer = made(tiny.gkd, tmp_path / str(shift), server, lmbda=1.0, max_steps=1)
        trainer.train()
        results.append(tiny.parameters(trainer.model))
    for name, p in results[0].items():
        torch.testing.assert_close(p, results[1][name], atol=0, rtol=0)


def test_an_engine_with_other_weights_stops_the_run_before_the_optimizer(server: RolloutServer, tmp_path: Path) -> None:
    server.manner = "stale"
    trainer = made(tiny.gkd, tmp_path, server, **GKD)
    before = tiny.parameters(trainer.model)
    with pytest.raises(RolloutError, match=r"nats a token away .* does not have the student's weights"):
        trainer.train()
    assert all(torch.equal(before[n], p) for n, p in trainer.model.named_parameters())


def test_a_gap_that_is_not_rounding_is_warned_of_with_advice(
    server: RolloutServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.shift = -0.3
    made(tiny.gkd, tmp_path, server, **GKD).train()
    assert "vLLM's log-probs of its own samples are 0.30 nats a token away" in caplog.text


@pytest.mark.parametrize(("manner", "error"), [
    ("no_ids", "left out token_ids"), ("own_stop", "The engine stops by rules of its own"),
    ("keeps_cache", "keeps keys and values of the old weights"),
    ("refuses", "did not load the student's weights from .*vllm-weights"),
])  # fmt: skip
def test_a_server_that_does_something_else_is_refused_with_the_reason(
    server: RolloutServer, tmp_path: Path, manner: str, error: str
) -> None:
    server.manner = manner
    with pytest.raises(RolloutError, match=error):
        made(tiny.gkd, tmp_path, server, **GKD).train()


def test_a_server_that_cannot_take_weights_is_refused_at_the_start(server: RolloutServer, tmp_path: Path) -> None:
    server.manner = "no_dev"
    with pytest.raises(RolloutError, match="VLLM_SERVER_DEV_MODE=1"):
        made(tiny.gkd, tmp_path / "out", server, **GKD)
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_or_a_short_window_is_refused_at_the_start(server: RolloutServer, tmp_path: Path) -> None:
    server.window = 100
    with pytest.raises(ConfigError, match=r"max_length is 256 tokens, and the server at .* takes 100"):
        made(tiny.gkd, tmp_path, server, **GKD)
    server.window, server.tokenizer = 512, zoo.turns()
    with pytest.raises(RolloutError, match="has another tokenizer than the student"):
        made(tiny.gkd, tmp_path, server, **GKD)


def test_a_server_that_is_busy_is_asked_again_and_one_that_is_gone_leaves_a_checkpoint(
    server: RolloutServer, tmp_path: Path
) -> None:
    server.manner = "busy"
    made(tiny.gkd, tmp_path / "busy", server, **GKD, max_steps=1).train()
    assert len(server.bodies_of("/v1/completions")) == 7
    server.manner, server.loaded = "gone", 0
    with pytest.raises(RolloutsUnavailable, match=r"vllm_server_timeout.*checkpoint-1"):
        made(tiny.gkd, tmp_path / "gone", server, **GKD, vllm_server_timeout=1.5).train()
    assert (tmp_path / "gone" / "checkpoint-1" / "trainer_state.json").exists()


def test_inner_epochs_resume_with_the_weights_of_their_completions(server: RolloutServer, tmp_path: Path) -> None:
    """A run that was cut between two steps on the same completions ends where the whole run ends."""
    server.shift = -0.4
    options: dict[str, Any] = dict(num_iterations=3, max_steps=3, save_strategy="steps", save_steps=2)
    whole = made(tiny.minillm, tmp_path / "a", server, **options)
    whole.train()
    resumed = made(tiny.minillm, tmp_path / "b", server, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert server.loaded == 1
    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0, msg=name)


def test_a_saved_batch_is_replayed_with_its_weights(server: RolloutServer, tmp_path: Path) -> None:
    server.shift = -0.5
    trainer = made(tiny.gkd, tmp_path, server, **GKD)
    (window,), _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    loss = float(trainer.batch_loss(trainer.model, window["batch"]).detach())
    save_batches(tmp_path / "kept", [window["batch"]], {})
    (again,) = replay(trainer, tmp_path / "kept")
    assert again["loss"] == pytest.approx(loss, rel=1e-5) and abs(loss) > 0.1


def test_a_student_that_is_no_number_is_dealt_with_as_ever(server: RolloutServer, tmp_path: Path) -> None:
    """The gap to it is no number either, and says nothing about the engine."""
    trainer = made(tiny.gkd, tmp_path, server, **GKD)
    (window,), _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("nan"))
    assert not torch.isfinite(trainer.batch_loss(trainer.model, window["batch"]))


def test_minillm_says_that_the_teacher_does_not_write_with_vllm(
    server: RolloutServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert made(tiny.minillm, tmp_path, server).mixed_alpha == 0
    assert "vLLM samples from the student alone" in caplog.text
