"""Equal vocabularies whose sides end a turn with other ids: stop is one event there too, whatever it is called."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support.tokenizers_zoo as zoo
import torch
from support import tiny

from diglot.comparisons import Batch
from diglot.objectives.jsd import full_jsd, jsd_with_stop
from diglot.rollouts import TeacherMixture

ENDS = "<|endoftext|>", "<|im_end|>"
ROWS: list[dict[str, Any]] = [{"prompt": "hello"}, {"prompt": "one two"}] * 2


def base_and_instruct() -> tuple[list[Any], list[Any], tuple[int, int]]:
    """Two models that write the same texts and end them with another id each, their tokenizers, and these ids."""
    tokenizers = [copy.deepcopy(zoo.chatml()) for _ in ENDS]
    for tokenizer, end in zip(tokenizers, ENDS, strict=True):
        tokenizer.chat_template, tokenizer.eos_token = None, end
    models = [tiny.tiny_model(tokenizer, 0) for tokenizer in tokenizers]
    a, b = (tokenizers[0].convert_tokens_to_ids(end) for end in ENDS)
    with torch.no_grad():
        models[1].lm_head.weight[[a, b]] = models[0].lm_head.weight[[b, a]]
    return models, tokenizers, (a, b)


def one_window(trainer: Any, rows: list[dict[str, Any]] = ROWS) -> Batch:
    batches = iter([trainer.data_collator(rows)])
    window: Batch = trainer.get_batch_samples(batches, 1, trainer.args.device)[0][0]["batch"]
    return window


def test_the_same_model_under_another_stop_id_is_no_distance_away() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    renamed = logits.detach()[:, [3, 1, 2, 0, 4, 5, 6, 7, 8]]
    for beta in (0.0, 0.5, 1.0):
        value = jsd_with_stop(logits, renamed, torch.tensor([0]), torch.tensor([3]), beta)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert value.abs().max() < 1e-12 and gradient.abs().max() < 1e-12
    assert full_jsd(logits, renamed).min() > 1e-3  # id by id they differ


def test_a_student_that_stops_too_rarely_is_taught_its_own_stop() -> None:
    logits = torch.zeros(1, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[-20.0, 0.0, 0.0, 5.0, 0.0, 0.0]], dtype=torch.float64)  # it ends with id 3
    for stop_t in ([3], [3, 0]):
        value = jsd_with_stop(logits, teacher, torch.tensor([0]), torch.tensor(stop_t), 1.0)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert value.isfinite().all() and gradient[0, 0] < 0, "its own stop becomes likelier"
        assert gradient[0, 3] > 0, "and the other side's, which ends nothing, less so"


def test_neither_trainer_unlearns_stopping(tmp_path: Path) -> None:
    models, tokenizers, (own, other) = base_and_instruct()
    text = tokenizers[0]("hello there")["input_ids"]
    for name, make in (("gkd", tiny.gkd), ("minillm", tiny.minillm)):
        options = {"lmbda": 1.0} if name == "gkd" else {}
        trainer: Any = make(tmp_path / name, *tokenizers, ROWS, models=tuple(models), max_steps=1, **options)
        assert trainer.comparisons[0].reader.same_vocabulary
        sides = trainer.student_renderer, trainer.comparisons[0].teacher.renderer
        assert [one.stop_ids for one in sides] == [(own,), (other,)]
        trainer.sample = lambda c, prompts, seeds: [np.array([*text, own]) for _ in prompts]
        batch = one_window(trainer)
        trainer.compute_loss(trainer.model, {"batch": batch}).backward()
        assert batch.views[0].read.stats["one_to_one"] == 4 * (len(text) + 1)
        assert max(float(p.grad.abs().max()) for p in trainer.model.parameters() if p.grad is not None) < 1e-5


@pytest.mark.parametrize("end", ENDS)
def test_any_id_of_the_stop_set_is_worth_the_same_reward(tmp_path: Path, end: str) -> None:
    tokenizer = zoo.chatml()
    ids = [tokenizer.convert_tokens_to_ids(one) for one in ENDS]
    models = tiny.tiny_model(tokenizer, 0), tiny.tiny_model(tokenizer, 0)
    for model in models:
        model.generation_config.eos_token_id = ids
    trainer = tiny.minillm(tmp_path, tokenizer, tokenizer, models=models, whiten_advantages=False)
    written = np.array([*tokenizer("hello")["input_ids"], tokenizer.convert_tokens_to_ids(end)])
    trainer.sample = lambda c, prompts, seeds: [written for _ in prompts]  # type: ignore[method-assign]
    rollout = one_window(trainer, tiny.PROMPT_ROWS[:4]).views[0].rollout
    assert rollout is not None and rollout.advantage is not None
    assert (rollout.logp_t - rollout.logp_old).abs().max() < 1e-5 and rollout.advantage.abs().max() < 1e-5


def test_sampling_with_the_teacher_stops_as_often_as_the_student_alone() -> None:
    models, tokenizers, (own, other) = base_and_instruct()
    prompt = torch.tensor([tokenizers[0]("hello there")["input_ids"]])
    with torch.no_grad():
        alone = models[0](input_ids=prompt).logits[:, -1].log_softmax(-1)
    mixture = TeacherMixture(models[1], [prompt[0].numpy()], own, 0.9, stops=([own], [other]))
    mixed = mixture(prompt, alone).log_softmax(-1)
    without = torch.ones_like(alone[0], dtype=torch.bool).index_fill(0, torch.tensor([own, other]), False)
    # What the student gives to the other's stop is text to nobody: the mixture takes it back, all else stays.
    share = 0.9 / (1 - alone[0, other].exp()) + 0.1
    assert torch.allclose(mixed[0, without], alone[0, without] + share.log(), atol=1e-5)
    assert torch.allclose(mixed[0, own], alone[0, own] + share.log(), atol=1e-5)
    assert torch.allclose(mixed[0, other], alone[0, other] + math.log(0.1), atol=1e-5)
