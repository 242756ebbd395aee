"""With equal vocabularies the loss is the textbook's at every token that was written, text or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support.tokenizers_zoo as zoo
import torch
from support import tiny
from torch import Tensor

from diglot.comparisons import Batch
from diglot.objectives import OBJECTIVES
from diglot.objectives.jsd import full_jsd
from diglot.rendering import Role


def _completion(kind: str) -> list[int]:
    """Ids of a reply with something in it that is no text."""
    tokenizer = zoo.chatml()
    text, table = tokenizer("hello there")["input_ids"], tokenizer.get_vocab()
    control, half, end = tokenizer.convert_tokens_to_ids("<|im_start|>"), table["Ã"], tokenizer.eos_token_id
    return {
        "text": [*text, end],
        "a control token": [*text[:2], control, *text[2:], end],
        "a control token first": [control, *text, end],
        "a control token last, unfinished": [*text, control],
        "half a character": [*text[:2], half, *text[2:], end],
        "half a character last, unfinished": [*text, half],
        "nothing but a control token": [control],
    }[kind]


KINDS = (
    "text",
    "a control token",
    "a control token first",
    "a control token last, unfinished",
    "half a character",
    "half a character last, unfinished",
    "nothing but a control token",
)


def _batch(trainer: Any, ids: list[int]) -> Batch:
    trainer.sample = lambda conversations, prompts, seeds: [np.array(ids) for _ in prompts]
    rows = [trainer.data_collator(tiny.PROMPT_ROWS[:1])]
    window: Batch = trainer.get_batch_samples(iter(rows), 1, trainer.args.device)[0][0]["batch"]
    return window


def _gradient(model: Any) -> Tensor:
    result = torch.cat([p.grad.ravel() for p in model.parameters()])
    model.zero_grad()
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_equal_vocabularies_is_the_textbooks_at_every_written_token(tmp_path: Path, kind: str) -> None:
    ids, tokenizer = _completion(kind), zoo.chatml()
    trainer = tiny.gkd(tmp_path, tokenizer, tokenizer, lmbda=1.0, max_completion_length=32)
    batch = _batch(trainer, ids)
    loss = trainer.compute_loss(trainer.model, {"batch": batch})
    loss.backward()
    gradient = _gradient(trainer.model)

    prompt = batch.pairs[0].student.ids[: batch.pairs[0].student.prompt_length].tolist()
    whole, teacher = torch.tensor([[*prompt, *ids]]), trainer.comparisons[0].teacher.model
    logits = [model(input_ids=whole).logits[0, len(prompt) - 1 : -1] for model in (trainer.model, teacher)]
    expected = full_jsd(logits[0], logits[1].detach(), 0.5).mean()
    expected.backward()
    assert batch.views[0].counts["jsd"] == len(ids)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (gradient - _gradient(trainer.model)).abs().max() <= 1e-5 * gradient.abs().max()
    stats = batch.views[0].read.stats
    assert stats["tokens"] == stats["covered"] == stats["written"] == len(ids)


def test_the_writers_stop_ends_the_text_though_it_is_none_of_the_teachers(tmp_path: Path) -> None:
    student, teacher = zoo.chatml(), zoo.chatml()
    models = tiny.tiny_model(student, 0), tiny.tiny_model(teacher, 1)
    other = student.convert_tokens_to_ids("<|endoftext|>")
    models[0].generation_config.eos_token_id = [student.eos_token_id, other]
    trainer = tiny.gkd(tmp_path, student, teacher, models=models, lmbda=1.0, max_completion_length=32)
    batch = _batch(trainer, [*_completion("half a character")[:-1], other])
    (pair,) = batch.pairs
    assert pair.student.ids[-1] == other and pair.teacher.ids[-1] in trainer.comparisons[0].teacher.renderer.stop_ids
    assert pair.student.roles[-1] == pair.teacher.roles[-1] == Role.STOP and pair.student.stopped == (True,)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective_can_read_tokens_that_are_no_text(tmp_path: Path, name: str) -> None:
    tokenizer = zoo.chatml()
    trainer = tiny.gkd(tmp_path, tokenizer, tokenizer, lmbda=1.0, max_completion_length=32, objective=name)
    for kind in KINDS:
        loss = trainer.compute_loss(trainer.model, {"batch": _batch(trainer, _completion(kind))})
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(_gradient(trainer.model)).all(), kind


@pytest.mark.parametrize("make", [tiny.gkd, tiny.minillm])
@pytest.mark.parametrize("others", [[], [zoo.turns]], ids=["alone", "beside another"])
def test_a_text_ends_before_an_id_that_only_the_students_wider_embedding_has(
    make: Any, others: list[Any], tmp_path: Path
) -> None:
    """Padding of the student's, which no row of the teacher's can read: the run went down with it."""
    own, text = zoo.chatml(), _completion("text")
    tokenizers = [own, *(other() for other in others)]
    teachers: Any = [{"name": tiny.tiny_model(t, k + 1), "label": str(k)} for k, t in enumerate(tokenizers)]
    models = tiny.tiny_model(own, 0, padding_rows=8), teachers
    options: dict[str, Any] = {"lmbda": 1.0} if make is tiny.gkd else {"teacher_mixed_alpha": 0.0}
    trainer = make(tmp_path, own, tokenizers, models=models, max_completion_length=32, **options)
    batch = _batch(trainer, [*text[:-1], len(own) + 3, *text])
    (pair,) = batch.pairs
    assert pair.student.ids[pair.student.prompt_length :].tolist() == text[:-1] and pair.student.stopped == (False,)
    assert all(view.read.stats["tokens"] == len(text) - 1 for view in batch.views)
    assert torch.isfinite(trainer.compute_loss(trainer.model, {"batch": batch}))


def test_a_teacher_of_another_vocabulary_keeps_the_text_what_all_can_read(tmp_path: Path) -> None:
    own, other = zoo.chatml(), zoo.turns()
    teachers = [{"name": tiny.tiny_model(t, k), "label": str(k)} for k, t in enumerate((own, other))]
    models = tiny.tiny_model(own, 5), teachers
    trainer = tiny.gkd(tmp_path, own, [own, other], models=models, lmbda=1.0, max_completion_length=32)  # type: ignore[arg-type]
    batch = _batch(trainer, _completion("a control token"))
    scored = [int(view.read.stats["tokens"]) for view in batch.views]
    assert scored[0] == scored[1] == len(_completion("a control token")) - 1
    assert torch.isfinite(trainer.compute_loss(trainer.model, {"batch": batch}))
