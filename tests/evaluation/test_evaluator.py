"""Tokenizer-free metrics against the same written by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import support.tokenizers_zoo as zoo
import torch
from datasets import Dataset
from support import tiny

from diglot.data import to_sample
from diglot.evaluation import OnPolicyReport, ReferenceReport
from diglot.evaluation.reports import ratio, ratio_error

SAMPLES = [to_sample(row, f"row {i}") for i, row in enumerate(tiny.CHAT_ROWS)]


def test_bits_per_byte_is_the_cross_entropy_of_the_texts_bytes(tmp_path: Path) -> None:
    """Against one sample at a time without padding; the stop token is no byte of the text."""
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst())
    report = trainer.evaluator().on_reference(SAMPLES)
    nats, size = 0.0, 0
    for sample in SAMPLES:
        rendered = trainer.student_renderer.render(sample.conversation, str(sample.reply), stopped=False)
        ids, start = torch.from_numpy(rendered.ids)[None], int(np.flatnonzero(rendered.segment == 0)[0])
        with torch.no_grad():
            logp = trainer.model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
        nats -= logp.gather(1, ids[0, start:, None]).sum().item()
        size += len(str(sample.reply).encode())
    assert report.bits_per_byte == pytest.approx(nats / size / math.log(2), rel=1e-5)


def test_the_divergence_of_equal_models_is_zero_and_their_stops_agree(tmp_path: Path) -> None:
    tokenizer = zoo.chatml()
    models = tiny.tiny_model(tokenizer, 3), tiny.tiny_model(tokenizer, 3)
    trainer = tiny.gkd(tmp_path, tokenizer, tokenizer, models=models)
    report = trainer.evaluator().on_policy([s.conversation for s in SAMPLES], trainer.sampler, max_new_tokens=8, seed=0)
    assert np.abs(report.gap).max() < 1e-4 and report.stop_agreement == pytest.approx(1, abs=1e-4)
    assert report.coverage == 1.0 and len(report.completions) == len(SAMPLES)


def test_the_divergence_is_the_log_ratio_of_what_was_written(tmp_path: Path) -> None:
    """Two tokenizers: sum of the student's log-probs minus sum of the teacher's on its own tokens of the same bytes."""
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst())
    ids = trainer.student_renderer.encoder.encode(["hello naïve"])[0].ids
    sampler = lambda model, prompts, **_: [ids for _ in prompts]  # noqa: E731
    conversation = SAMPLES[0].conversation
    report = trainer.evaluator().on_policy([conversation], sampler, max_new_tokens=8, seed=0)  # type: ignore[arg-type]
    expected = []
    for renderer, model in (
        (trainer.student_renderer, trainer.model),
        (trainer.comparisons[0].teacher.renderer, trainer.comparisons[0].teacher.model),
    ):
        x = torch.from_numpy(renderer.render(conversation, "hello naïve", stopped=False).ids)[None]
        start = len(renderer.prompt_ids(conversation))
        with torch.no_grad():
            logp = model(input_ids=x).logits[0, start - 1 : -1].log_softmax(-1).gather(1, x[0, start:, None]).sum()
        expected.append(logp.item())
    assert report.gap[0] == pytest.approx(expected[0] - expected[1], abs=1e-3)
    assert report.reverse_kl_nats_per_byte == pytest.approx(report.gap[0] / len("hello naïve".encode()))


def test_another_seed_gives_other_samples_and_the_same_seed_the_same(tmp_path: Path) -> None:
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst())
    texts = [
        trainer.evaluator()
        .on_policy([s.conversation for s in SAMPLES], trainer.sampler, max_new_tokens=8, seed=seed)
        .completions
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"top_p": 0.5}, {"top_k": 2}])
def test_how_training_samples_plays_no_part_in_the_divergence_of_an_evaluation(
    tmp_path: Path, options: dict[str, float]
) -> None:
    data = Dataset.from_list(tiny.PROMPT_ROWS)
    plain, sampled = (tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), **one).evaluate(data) for one in ({}, options))
    assert sampled == plain


def test_evaluation_leaves_mode_and_random_state_alone(tmp_path: Path) -> None:
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst())
    trainer.model.train()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    trainer.evaluator().on_policy([SAMPLES[0].conversation], trainer.sampler, max_new_tokens=4, seed=0)
    assert trainer.model.training and torch.equal(state, torch.get_rng_state())


def test_the_error_of_a_ratio_is_the_spread_of_repeated_draws() -> None:
    """Linearised standard error against 2,000 draws of the whole sample."""
    rng = np.random.default_rng(0)
    bottom = rng.integers(50, 150, size=(2000, 60)).astype(float)
    top = 0.2 * bottom + rng.normal(0, 4, size=bottom.shape)
    spread = np.std([ratio(t, b) for t, b in zip(top, bottom, strict=True)])
    errors = np.mean([ratio_error(t, b) for t, b in zip(top, bottom, strict=True)])
    assert errors == pytest.approx(spread, rel=0.1)


def test_nothing_to_evaluate_is_not_a_number() -> None:
    empty = np.zeros(0)
    assert math.isnan(ReferenceReport(empty, empty).bits_per_byte)
    assert math.isnan(OnPolicyReport(*[empty] * len(OnPolicyReport.columns())).reverse_kl_nats_per_byte)  # type: ignore[arg-type]
