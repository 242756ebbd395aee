"""What an inspection says of two models with weights, against the models asked directly."""

from __future__ import annotations

import math

import pytest
import support.tokenizers_zoo as zoo
import torch
from support import tiny

from diglot.batches import PairReader
from diglot.data import Sample
from diglot.errors import DataError
from diglot.inspection import ModelFacts, inspect_models
from diglot.rendering import Conversation, Renderer
from diglot.teachers import LocalTeacher

ROWS = [Sample(Conversation(None, "Say:"), text, "test") for text in ("hello there", "one two three", "x = 1")]


@pytest.fixture(scope="module")
def setup() -> tuple[torch.nn.Module, LocalTeacher, PairReader]:
    renderers = Renderer(zoo.chatml(), name="student"), Renderer(zoo.inst(), name="teacher")
    student, teacher = tiny.tiny_model(zoo.chatml(), 0), tiny.tiny_model(zoo.inst(), 1)
    return student, LocalTeacher(teacher, renderers[1]), PairReader(*renderers, same_vocabulary=False)


@pytest.fixture(scope="module")
def facts(setup: tuple) -> ModelFacts:
    return inspect_models(*setup, ROWS, batch_size=2, max_completion_length=6)


def bits(model: torch.nn.Module, renderer: Renderer) -> float:
    nats, size = 0.0, 0
    for row in ROWS:
        rendered = renderer.render(row.conversation, str(row.reply), stopped=False)
        ids = torch.from_numpy(rendered.ids)[None]
        logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        nats -= float(logp[torch.from_numpy(rendered.segment[1:] >= 0)].sum())
        size += len(str(row.reply).encode())
    return nats / math.log(2) / size


@torch.no_grad()
def test_bits_per_byte_of_both_sides_are_those_of_a_plain_pass(setup: tuple, facts: ModelFacts) -> None:
    student, teacher, reader = setup
    assert facts.bits_per_byte_student == pytest.approx(bits(student, reader.student), rel=1e-4)
    assert facts.bits_per_byte_teacher == pytest.approx(bits(teacher.model, reader.teacher), rel=1e-4)


def test_two_random_models_differ_and_the_same_one_twice_does_not(setup: tuple, facts: ModelFacts) -> None:
    assert facts.headroom_nats_per_byte > 0 and 0 <= facts.stop_agreement <= 1 and facts.sample_coverage > 0.5
    student, _, reader = setup
    same = PairReader(reader.student, reader.student, same_vocabulary=True)
    alike = inspect_models(student, LocalTeacher(student, reader.student), same, ROWS, batch_size=2)
    assert alike.headroom_nats_per_byte == pytest.approx(0, abs=1e-5)
    assert alike.stop_agreement == pytest.approx(1, abs=1e-5)
    assert alike.bits_per_byte_student == alike.bits_per_byte_teacher
    assert any("little to learn" in line for line in alike.says)


def test_memory_is_that_of_the_weights_and_of_what_a_backward_pass_keeps(setup: tuple, facts: ModelFacts) -> None:
    size = 4 * sum(p.numel() for p in setup[0].parameters())
    whole = size + 4 * sum(p.numel() for p in setup[1].model.parameters())
    assert facts.gib_weights * 2**30 == pytest.approx(whole)
    assert facts.gib_optimizer * 2**30 == pytest.approx(3 * size)
    twice = inspect_models(*setup, ROWS, batch_size=4, max_completion_length=6)
    assert 1.5 < twice.gib_activations / facts.gib_activations < 2.7
    assert twice.gib_total > facts.gib_total and facts.seconds_total > 0


def test_the_models_are_left_as_they_were(setup: tuple) -> None:
    student, teacher, _ = setup
    before = tiny.parameters(student)
    grads = [p.requires_grad for p in student.parameters()]
    inspect_models(*setup, ROWS, batch_size=1, max_completion_length=2)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in student.named_parameters())
    assert [p.requires_grad for p in student.parameters()] == grads
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_without_data_the_built_in_texts_are_continued(setup: tuple) -> None:
    measures = inspect_models(*setup, batch_size=1, max_completion_length=2)
    assert math.isfinite(measures.bits_per_byte_student) and math.isfinite(measures.headroom_nats_per_byte)


def test_rows_without_replies_leave_bits_per_byte_unknown(setup: tuple) -> None:
    rows = [Sample(Conversation(None, "Say hello"), None, "row 0")]
    measures = inspect_models(*setup, rows, batch_size=1, max_completion_length=2)
    assert math.isnan(measures.bits_per_byte_student) and math.isfinite(measures.headroom_nats_per_byte)


def test_rows_without_a_prompt_are_refused(setup: tuple) -> None:
    with pytest.raises(DataError, match="No row has a prompt"):
        inspect_models(*setup, [Sample(Conversation(None), "text only", "row 0")])
