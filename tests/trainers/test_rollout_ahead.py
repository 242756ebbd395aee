"""`rollout_ahead`: completions are one window old. Who wrote them, what is made up for, and that resume is exact."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support.tokenizers_zoo as zoo
import torch
from checkpoints.test_resume import same_run
from support import tiny
from support.rollout_server import RolloutServer

from diglot.errors import ConfigError, RolloutsUnavailable
from diglot.rollouts.logps import with_logps

FAST: dict[str, Any] = dict(optim="sgd", learning_rate=0.5, max_grad_norm=0.0, max_completion_length=6)


@pytest.fixture
def server() -> Iterator[RolloutServer]:
    endpoint = RolloutServer(tiny.tiny_model(zoo.chatml(), 5), zoo.chatml()).start()
    yield endpoint
    endpoint.stop()


def made(make: Any, out: Path, **options: Any) -> Any:
    common = dict(lmbda=1.0) if make is tiny.gkd else dict(num_iterations=1)
    return make(out, zoo.chatml(), zoo.inst(), tiny.PROMPT_ROWS, **{**FAST, **common, "max_steps": 4, **options})


def watched(trainer: Any) -> tuple[list[list[np.ndarray]], list[dict[str, torch.Tensor]]]:
    """The completions of each step that prepares a window, and the weights before it, noted in a run."""
    texts: list[list[np.ndarray]] = []
    weights: list[dict[str, torch.Tensor]] = []
    prepare = trainer.prepare

    def noted(window: Any) -> Any:
        weights.append(tiny.parameters(trainer.model))
        batches = prepare(window)
        placed = [(place, pair) for b in batches for place, pair in zip(b.places, b.pairs, strict=True)]
        texts.append([pair.student.ids for _, pair in sorted(placed, key=lambda both: both[0])])
        return batches

    trainer.prepare = noted
    trainer.train()
    return texts, weights


def written_by(trainer: Any, weights: dict[str, torch.Tensor], texts: list[np.ndarray], step: int) -> bool:
    """Are these the completions that the student with `weights` writes for the prompts of `step`?"""
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            p.copy_(weights[name])
    prompts = [ids[: _prompt(trainer, ids)] for ids in texts]
    seeds = trainer.row_seeds("rollouts", [prompts], 1, step)[0]
    result = trainer.sampler(trainer.student, prompts, max_new_tokens=6, seed=seeds)
    both = zip(texts, prompts, result, strict=True)
    return all(np.array_equal(ids, np.concatenate([prompt, own])) for ids, prompt, own in both)


def _prompt(trainer: Any, ids: np.ndarray) -> int:
    for row in tiny.PROMPT_ROWS:
        head = trainer.student_renderer.tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        if ids[: len(head)].tolist() == head:
            return len(head)
    raise AssertionError("no prompt of the data")


@pytest.mark.parametrize(("ahead", "of_step"), [(0, [0, 1, 2, 3]), (1, [0, 0, 2, 2])])
def test_completions_are_of_the_weights_of_one_step_ago(tmp_path: Path, ahead: int, of_step: list[int]) -> None:
    """But for the first window of an epoch, here of two: before it there is none that could be trained on meanwhile."""
    trainer = made(tiny.gkd, tmp_path, rollout_ahead=ahead)
    texts, weights = watched(trainer)
    assert len(texts) == 4
    for step, wrote in enumerate(of_step):
        results = [written_by(trainer, weights[k], texts[step], step) for k in range(4)]
        assert results[wrote] and sum(results) < 4, (step, results)
    logs = [e for e in trainer.state.log_history if "loss" in e]
    assert [e.get("sampling/steps_old") for e in logs] == ([0, 1, 0, 1] if ahead else [None] * 4)


def test_inner_epochs_are_trained_on_what_was_written_before_the_first_of_the_window_before(tmp_path: Path) -> None:
    trainer = made(tiny.minillm, tmp_path, rollout_ahead=1, num_iterations=2, learning_rate=0.01)
    texts, weights = watched(trainer)
    assert all(map(np.array_equal, texts[2], texts[3]))
    assert written_by(trainer, weights[0], texts[2], 2) and not written_by(trainer, weights[2], texts[2], 2)
    assert trainer.mixed_alpha == 0


@pytest.mark.parametrize("make", [tiny.gkd, tiny.minillm], ids=["gkd", "minillm"])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resume_is_exact_while_completions_wait(tmp_path: Path, make: Any, stop: int) -> None:
    """What was written ahead is in the checkpoint: its weights are gone."""
    options: dict[str, Any] = dict(max_steps=5, save_steps=stop, rollout_ahead=1)
    options |= {"lmbda": 0.5, "objective": "span"} if make is tiny.gkd else {"num_iterations": 2}
    rows = {"rows": tiny.CHAT_ROWS * 2 if make is tiny.gkd else tiny.PROMPT_ROWS * 2}
    same_run(make, tmp_path, "inst", stop, **options, **rows)
    if make is tiny.minillm:
        assert (tmp_path / "a" / f"checkpoint-{stop}" / "ahead-0.json").exists()


def test_what_the_student_says_of_its_own_text_is_its_log_prob(tmp_path: Path) -> None:
    trainer = made(tiny.gkd, tmp_path)
    prompts = [np.array([1, 5, 9]), np.array([1, 7, 7, 8, 3]), np.array([2])]
    own = trainer.sampler.write(trainer.student, prompts, max_new_tokens=7, seed=3)
    result = with_logps(trainer.student, trainer.student_head, prompts, own, 0, at_a_time=2, chunk_rows=4)
    for prompt, completion in zip(prompts, result, strict=True):
        text = torch.from_numpy(np.concatenate([prompt, completion.ids]))
        rows = trainer.student(text[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = rows.gather(1, text[len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.from_numpy(completion.logps).float(), expected.detach())


@pytest.mark.parametrize(("make", "most", "options"), [
    (tiny.gkd, 0.5, {"objective": "span"}), (tiny.minillm, 1.02, {}),
])  # fmt: skip
def test_a_policy_gradient_is_weighted_by_the_student_of_now_over_the_one_that_wrote(
    tmp_path: Path, make: Any, most: float, options: dict[str, Any]
) -> None:
    """Token by token, and cut at the largest weight that is allowed."""
    options = {**options, "learning_rate": 2e-3, "max_steps": 2, "max_completion_length": 12}
    trainer = made(make, tmp_path, rollout_ahead=1, vllm_importance_sampling_clip_max=most, **options)
    old = tiny.tiny_model(zoo.chatml(), 0)
    results: list[tuple[torch.Tensor | None, torch.Tensor]] = []
    measure = trainer.rollouts.measure

    def noted(batch: Any, *arguments: Any) -> None:
        measure(batch, *arguments)
        ids, logps = batch.student.targets[:, None], []
        with torch.no_grad():
            for model in (trainer.model, old):
                rows = model.lm_head(trainer.hidden_at_rows(model, batch.student)).log_softmax(-1)
                logps.append(rows.gather(1, ids)[:, 0])
        results.append((batch.sampler_weight, (logps[0] - logps[1]).exp()))

    trainer.rollouts.measure = noted
    trainer.train()
    assert results[0][0] is None  # the first window was written by the very student
    weight, ratio = results[-1]
    assert weight is not None and ratio.max() > most > ratio.min()
    torch.testing.assert_close(weight, ratio.clamp(max=most), rtol=1e-4, atol=1e-5)


def test_a_divergence_of_rows_is_not_weighted(tmp_path: Path) -> None:
    """Its texts are old, its rows are not: the weight of a token says nothing about them."""
    ends = []
    for correction in (True, False):
        trainer = made(tiny.gkd, tmp_path, rollout_ahead=1, vllm_importance_sampling_correction=correction)
        trainer.train()
        ends.append(tiny.parameters(trainer.model))
    assert all(torch.equal(p, ends[1][name]) for name, p in ends[0].items())


def test_only_the_students_texts_of_now_are_called_a_divergence(tmp_path: Path) -> None:
    trainer = made(tiny.minillm, tmp_path, rollout_ahead=1, max_steps=2)
    trainer.train()
    logs = [e for e in trainer.state.log_history if "loss" in e]
    assert all("minillm/log_ratio" in e and "reverse_kl" not in e for e in logs)


def test_texts_of_the_data_are_not_written_for(tmp_path: Path) -> None:
    """The draw of who writes is that of the step at which the window is trained on."""
    options: dict[str, Any] = dict(rollout_ahead=1, lmbda=0.5, max_steps=6)
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), tiny.CHAT_ROWS * 3, **FAST, **options)
    written: list[int] = []
    later = trainer.rollouts.write_later
    trainer.rollouts.write_later = lambda student, step, *arguments, **more: (
        written.append(step + 1) or later(student, step, *arguments, **more)
    )
    trainer.train()
    assert written == [step for step in range(1, 6) if trainer.student_writes_at(step)] and len(written) < 5


def test_prompts_that_do_not_fit_are_counted_once(tmp_path: Path) -> None:
    rows = [*tiny.PROMPT_ROWS, {"prompt": [{"role": "user", "content": "long " * 300}]}] * 2
    counts = []
    for ahead in (0, 1):
        trainer = tiny.gkd(
            tmp_path / str(ahead), zoo.chatml(), zoo.inst(), rows, **FAST, lmbda=1.0, max_steps=4, rollout_ahead=ahead
        )
        trainer.train()
        counts.append([e["align/dropped_samples"] for e in trainer.state.log_history if "loss" in e])
    assert counts[0] == counts[1] and sum(counts[0]) > 0


# ---- with a server ---------------------------------------------------------------------------------------------------


def served(make: Any, out: Path, server: RolloutServer, **options: Any) -> Any:
    own = dict(use_vllm=True, vllm_server_base_url=server.url, vllm_server_timeout=5.0, rollout_ahead=1)
    return made(make, out, **{**own, "learning_rate": 1e-4, **options})


def test_a_server_writes_while_the_student_is_trained(
    server: RolloutServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its first answer to what was asked ahead is held back until a loss has been formed."""
    trainer = served(tiny.gkd, tmp_path, server, objective="span", max_steps=2)
    assert "only costs" not in caplog.text
    trained, complete, loss = threading.Event(), server.complete, trainer.compute_loss
    waited: list[bool] = []

    def late(body: Any) -> tuple[int, Any]:
        if len(server.bodies_of("/v1/completions")) > 4:
            waited.append(trained.wait(20))
        return complete(body)

    def losing(*arguments: Any, **more: Any) -> Any:
        trained.set()
        return loss(*arguments, **more)

    server.complete, trainer.compute_loss = late, losing  # type: ignore[method-assign]
    trainer.train()
    assert waited and all(waited) and server.loaded == 1
    logs = [e for e in trainer.state.log_history if "loss" in e]
    assert logs[0]["sampling/logp_gap_max"] < 1e-4 < logs[1]["sampling/logp_gap_max"]
    assert [e["sampling/steps_old"] for e in logs] == [0, 1]


def test_a_server_that_goes_meanwhile_leaves_a_checkpoint(server: RolloutServer, tmp_path: Path) -> None:
    trainer = served(tiny.gkd, tmp_path, server, max_steps=4, vllm_server_timeout=0.3)
    loss = trainer.compute_loss

    def going(*arguments: Any, **more: Any) -> Any:
        if trainer.state.global_step == 0:
            server.manner, server.loaded = "gone", 2
        return loss(*arguments, **more)

    trainer.compute_loss = going
    with pytest.raises(RolloutsUnavailable, match="checkpoint-"):
        trainer.train()
    assert list(tmp_path.glob("checkpoint-*/trainer_state.json"))


# ---- refused, or said ------------------------------------------------------------------------------------------------


def test_a_student_here_only_costs_which_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made(tiny.gkd, tmp_path / "a")
    assert "only costs" not in caplog.text
    made(tiny.gkd, tmp_path / "b", rollout_ahead=1)
    assert "rollout_ahead=1 only costs here" in caplog.text


@pytest.mark.parametrize(("options", "error"), [
    ({"lmbda": 0.0}, "lmbda=0 it never writes"), ({"rollout_ahead": 2}, "rollout_ahead=2 is not allowed"),
])  # fmt: skip
def test_what_cannot_be_written_ahead_is_refused(tmp_path: Path, options: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        made(tiny.gkd, tmp_path, **{"rollout_ahead": 1, **options})


def test_epochs_of_one_window_write_nothing_ahead_which_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = made(tiny.gkd, tmp_path, rollout_ahead=1, per_device_train_batch_size=8, max_steps=3)
    trainer.train()
    assert caplog.text.count("rollout_ahead writes nothing ahead") == 1
    assert all(e["sampling/steps_old"] == 0 for e in trainer.state.log_history if "loss" in e)


def test_completions_of_other_rows_are_written_anew_which_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = dict(rollout_ahead=1, save_strategy="steps", save_steps=1, max_steps=2)
    made(tiny.gkd, tmp_path, **options).train()
    resumed = made(tiny.gkd, tmp_path, ignore_data_skip=True, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "answer other prompts than" in caplog.text
