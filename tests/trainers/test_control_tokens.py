"""A student that writes control tokens where its teacher writes none is taught not to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
import torch
from support import tiny
from support.scored import pair as scored_pair
from torch import Tensor

from diglot.batches import PairReader
from diglot.objectives import Pair
from diglot.objectives.masses import no_text
from diglot.objectives.strict import strict_divergence
from diglot.rendering import Conversation, Renderer

ROWS_THAT_SEE_THEM: tuple[Any, ...] = (
    "covering",
    {"name": "strict", "residual": True},
    {"name": "strict", "residual": True, "top_k": 0},
    "bpm",
    "shared_prefix",
)


def _talkative(trainer: Any, student: Any, mass: float = 0.25) -> None:
    """Give the student's control token `<|im_start|>` about this mass everywhere."""
    token = zoo.chatml().convert_tokens_to_ids("<|im_start|>")
    hidden = _rows(trainer).detach()
    row = torch.zeros(hidden.shape[1], requires_grad=True)
    others = (hidden @ student.lm_head.weight.detach().T).index_fill(1, torch.tensor([token]), -torch.inf)
    optimizer = torch.optim.Adam([row], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        logits = torch.cat([others, (hidden @ row)[:, None]], dim=-1)
        (logits.softmax(-1)[:, -1] - mass).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        student.lm_head.weight[token] = row


def _rows(trainer: Any) -> Tensor:
    batches = iter([trainer.data_collator(tiny.CHAT_ROWS[:4])])
    batch = trainer.get_batch_samples(batches, 1, trainer.args.device)[0][0]["batch"]
    result: Tensor = trainer.hidden_at_rows(trainer.model, batch.student)
    return result


@torch.no_grad()
def _silent_mass(trainer: Any) -> float:
    silent, _ = no_text(trainer.comparisons[0].pair)
    rows = trainer.student_head(_rows(trainer)).softmax(-1)
    return float(rows[:, silent].sum(-1).mean())


@pytest.mark.parametrize("objective", ROWS_THAT_SEE_THEM, ids=str)
def test_training_takes_the_mass_off_control_tokens_that_the_teacher_never_writes(
    tmp_path: Path, objective: Any
) -> None:
    tokenizer, other = zoo.chatml(), zoo.inst()
    student, teacher = tiny.tiny_model(tokenizer, 0), tiny.tiny_model(other, 1)
    options: dict[str, Any] = dict(lmbda=0.0, max_steps=60, learning_rate=3e-3, logging_steps=60, beta=0.5)
    trainer = tiny.gkd(tmp_path, tokenizer, other, models=(student, teacher), objective=[objective], **options)
    _talkative(trainer, student)
    before = _silent_mass(trainer)
    trainer.train()
    assert before > 0.15 and _silent_mass(trainer) < before / 4


def test_control_tokens_do_not_take_the_place_of_text_that_the_teacher_alone_has() -> None:
    """One bin for all that is not chosen would not tell a control token from a word of the teacher's own."""
    pair: Pair = scored_pair("chatml", "inst")
    silent = no_text(pair)
    assert len(silent[0]) and not set(silent[0].tolist()) & set(pair.stop_s.tolist())
    teacher = torch.zeros(1, pair.size_t).index_fill(1, silent[1], -30.0)
    student = torch.zeros(1, pair.size_s).index_fill(1, silent[0], 5.0).requires_grad_()
    options: dict[str, Any] = dict(top_k=2, beta=0.5, residual=True)
    values = strict_divergence(student, teacher, pair, silent=silent, **options)
    (gradient,) = torch.autograd.grad(values.loss.sum(), student)
    assert (gradient[0, silent[0]] > 0).all()
    blind = strict_divergence(student, teacher, pair, **options)
    assert values.loss.item() > blind.loss.item() + 0.1


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_side_without_anything_beside_the_chosen_tokens_makes_no_loss_infinite(beta: float) -> None:
    """All tokens of the teacher are shared or control tokens; the student has others, too."""
    pair: Pair = scored_pair("chatml", "inst")
    silent = no_text(pair)
    student = torch.zeros(2, pair.size_s, requires_grad=True)
    teacher = torch.zeros(2, pair.size_t)
    teacher[:, ~torch.isin(torch.arange(pair.size_t), torch.cat([pair.shared_t, pair.stop_t, silent[1]]))] = -torch.inf
    loss = strict_divergence(student, teacher, pair, top_k=None, beta=beta, residual=True, silent=silent).loss
    loss.sum().backward()
    assert torch.isfinite(loss).all() and student.grad is not None and torch.isfinite(student.grad).all()


def test_ids_that_only_pad_the_students_embedding_are_read_like_control_tokens() -> None:
    """They have no name: one that stands first, or two in a row, leave no empty text between them on one side."""
    student = Renderer(zoo.chatml(), name="student", num_embeddings=len(zoo.chatml()) + 2)
    teacher = Renderer(zoo.inst(), name="teacher")
    reader, padding = PairReader(student, teacher, same_vocabulary=False), len(zoo.chatml())
    hello, there = (zoo.chatml()(text, add_special_tokens=False).input_ids for text in ("hello", " there"))
    written = [padding, *hello, padding, padding + 1, *there, padding, student.stop_id]
    pair = reader.sampled(Conversation(({"role": "user", "content": "Say hello."},)), written)
    assert pair is not None
    assert pair.student.segment_bytes == pair.teacher.segment_bytes == (b"hello", b" there", b"")
