"""Several teachers: weights, routes, tokenizers of their own, in both trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support.tokenizers_zoo as zoo
import torch
from datasets import Dataset
from support import tiny
from support.teacher_server import TeacherServer
from torch import Tensor

from diglot.comparisons import scores_of
from diglot.errors import AlignmentError, ConfigError, DataError
from diglot.objectives import OBJECTIVES
from diglot.objectives.byte import byte_distribution, smoothed
from diglot.objectives.divergences import generalized_jsd
from diglot.teachers import served

ROWS = tiny.CHAT_ROWS[:4]
BALANCED = {"xtoken_p", "xtoken_h"}
ANY = sorted(set(OBJECTIVES) - {"jsd", "dskd"} - BALANCED)


def made(make: Any, out: Path, teachers: list[Any], tokenizers: list[Any], rows: Any = ROWS, **options: Any) -> Any:
    """A trainer with these teachers; `teachers` are seeds with their weight, or models."""
    student = zoo.chatml()
    entries = [
        {"name": tiny.tiny_model(tokenizer, seed), "weight": weight, "label": label}
        for (label, seed, weight), tokenizer in zip(teachers, tokenizers, strict=True)
    ]
    extra = {"lmbda": 1.0} if make is tiny.gkd else {"num_iterations": 2, "teacher_mixed_alpha": 0.0}
    models = (tiny.tiny_model(student, 0), entries)
    return make(out, student, tokenizers, rows, models=models, **{**extra, **options})


def loss_and_gradient(trainer: Any, rows: Any = ROWS, size: int = 2) -> tuple[float, Tensor]:
    batches = [trainer.data_collator(rows[i : i + size]) for i in range(0, len(rows), size)]
    trainer.model.zero_grad()
    total = 0.0
    for inputs in trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)[0]:
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.ravel() for p in trainer.model.parameters()])


def agree(a: tuple[float, Tensor], b: tuple[float, Tensor]) -> None:
    assert a[0] == pytest.approx(b[0], rel=1e-4, abs=1e-6)
    assert (a[1] - b[1]).norm() <= 1e-4 * b[1].norm() + 1e-8


@pytest.mark.parametrize("objective", ANY)
def test_two_equal_teachers_are_one_and_a_weight_of_nought_is_none(tmp_path: Path, objective: str) -> None:
    own = zoo.turns()
    one = loss_and_gradient(made(tiny.gkd, tmp_path, [("a", 1, 1.0)], [own], objective=objective))
    twice = made(tiny.gkd, tmp_path, [("a", 1, 0.5), ("b", 1, 1.5)], [own, own], objective=objective)
    agree(loss_and_gradient(twice), one)
    first = made(tiny.gkd, tmp_path, [("a", 1, 1.0), ("b", 2, 0.0)], [own, zoo.inst()], objective=objective)
    agree(loss_and_gradient(first), one)


def test_minillm_weighs_its_teachers(tmp_path: Path) -> None:
    one = loss_and_gradient(made(tiny.minillm, tmp_path, [("a", 1, 1.0)], [zoo.turns()]))
    for second, weight in ((1, 1.0), (2, 0.0)):
        pair = made(tiny.minillm, tmp_path, [("a", 1, 1.0), ("b", second, weight)], [zoo.turns(), zoo.turns()])
        agree(loss_and_gradient(pair), one)


@pytest.mark.parametrize("make", [tiny.gkd, tiny.minillm])
def test_the_loss_is_the_weighted_mean_of_the_losses_of_each(tmp_path: Path, make: Any) -> None:
    """Teachers with different tokenizers read the same text, which the student has written once."""
    names = [zoo.turns(), zoo.unigram()]
    a = loss_and_gradient(made(make, tmp_path, [("a", 1, 1.0)], names[:1]))
    b = loss_and_gradient(made(make, tmp_path, [("b", 2, 1.0)], names[1:]))
    both = made(make, tmp_path, [("a", 1, 1.0), ("b", 2, 3.0)], names)
    runs: list[int] = []
    both.model.model.register_forward_pre_hook(lambda module, *_: runs.append(1) if module.training else None)
    both.model.train()
    result = loss_and_gradient(both)
    agree(result, (0.25 * a[0] + 0.75 * b[0], 0.25 * a[1] + 0.75 * b[1]))
    if make is tiny.gkd:
        assert len(runs) == 2  # one pass for each micro-batch, not for each teacher


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_kl_of_next_byte_distributions_is_that_of_their_mixture(tmp_path: Path, beta: float) -> None:
    """In the gradient, for teachers with different tokenizers: the forward KL that of the arithmetic mixture, the
    reverse KL that of the normalised geometric one."""
    objective = [{"name": "byte", "beta": beta, "anchor": 0.0}]
    trainer = made(
        tiny.gkd, tmp_path, [("a", 1, 1.0), ("b", 2, 3.0)], [zoo.turns(), zoo.inst()], lmbda=0.0, objective=objective
    )
    _, gradient = loss_and_gradient(trainer, ROWS, 4)
    inputs = trainer.get_batch_samples(iter([trainer.data_collator(ROWS)]), 1, trainer.args.device)[0][0]
    distributions: list[Tensor] = []
    batch = inputs["batch"]
    hidden = trainer.hidden_at_rows(trainer.model, batch.student)
    for view in batch.views:
        scores, byte = scores_of(batch, view, hidden, trainer.student_head), view.comparison.terms[0].objective
        plan = view.plans["byte"]
        distribution = byte_distribution(scores.summarised_teacher(byte.summary_t(plan)), plan.teacher)[0]
        weight = view.comparison.weight
        distributions.append(weight * (smoothed(distribution) if beta == 0 else smoothed(distribution).log()))
    mixture = (
        (distributions[0] + distributions[1]).log()
        if beta == 0
        else (distributions[0] + distributions[1]).log_softmax(-1)
    )
    distribution_s = byte_distribution(scores.summarised_student(byte.summary_s(plan)), plan.student)[0]
    trainer.model.zero_grad()
    generalized_jsd(smoothed(distribution_s).log(), mixture, beta).mean().backward()
    mixed = torch.cat([p.grad.ravel() for p in trainer.model.parameters()])
    assert (gradient - mixed).norm() <= 1e-4 * mixed.norm()


ROUTED = [{**row, "teacher": "ab"[i % 2]} for i, row in enumerate(ROWS)]


@pytest.mark.parametrize("make", [tiny.gkd, tiny.minillm])
def test_routed_rows_use_their_own_teacher_alone(tmp_path: Path, make: Any) -> None:
    """Different tokenizers in one batch; the other teacher's weights may be anything."""
    names = [zoo.turns(), zoo.inst()]
    trainer = made(make, tmp_path, [("a", 1, 1.0), ("b", 2, 1.0)], names, ROUTED)
    inputs = trainer.get_batch_samples(iter([trainer.data_collator(ROUTED)]), 1, trainer.args.device)[0][0]
    for k, view in enumerate(inputs["batch"].views):
        own = [p.conversation.messages[-1]["content"] for p in view.read.pairs]
        assert own == [row["messages"][0]["content"] for row in ROUTED[k::2]]
    result = loss_and_gradient(trainer, ROUTED, 4)
    nan = made(make, tmp_path, [("a", 1, 1.0), ("b", 2, 1.0)], names, ROUTED)
    only_a = [row for row in ROUTED if row["teacher"] == "a"]
    with torch.no_grad():
        for p in nan.comparisons[1].teacher.model.parameters():
            p.fill_(float("nan"))
    assert np.isfinite(loss_and_gradient(nan, only_a, 2)[0]) and np.isfinite(result[0])


def test_routed_items_count_alike(tmp_path: Path) -> None:
    """Both routes to one and the same teacher: as if there were no routes. Both steps of the same rollouts, too."""
    for make in (tiny.gkd, tiny.minillm):
        names = [zoo.turns(), zoo.turns()]
        options: dict[str, Any] = {} if make is tiny.gkd else {"whiten_advantages": False}
        routed = made(make, tmp_path, [("a", 1, 1.0), ("b", 1, 1.0)], names, ROUTED, **options)
        plain = made(make, tmp_path, [("a", 1, 1.0)], names[:1], **options)
        agree(loss_and_gradient(routed, ROUTED, 4), loss_and_gradient(plain, ROWS, 4))
        if make is tiny.minillm:
            for trainer in (routed, plain):
                trainer.state.global_step = 1
            agree(loss_and_gradient(routed, ROUTED, 4), loss_and_gradient(plain, ROWS, 4))


@pytest.mark.parametrize("make", [tiny.gkd, tiny.minillm])
def test_trains_evaluates_and_resumes_with_several(tmp_path: Path, make: Any) -> None:
    names = [zoo.turns(), zoo.unigram()]

    def run(out: str, **options: Any) -> Any:
        return made(
            make, tmp_path / out, [("a", 1, 1.0), ("b", 2, 3.0)], names, ROUTED, max_steps=4, save_strategy="steps",
            save_steps=3, min_coverage=0.0, max_completion_length=24, seed=7, **options,
        )  # fmt: skip

    whole = run("whole")
    whole.train()
    metrics = whole.evaluate(whole.train_dataset)
    assert np.isfinite(metrics["eval_reverse_kl_nats_per_byte"]) and np.isfinite(metrics["eval_bits_per_byte"])
    again = run("again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    def refuse(teachers: Any, match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            made(tiny.gkd, tmp_path, teachers, [zoo.turns()] * len(teachers))

    refuse([("a", 1, 1.0), ("a", 2, 1.0)], "label")
    refuse([("a", 1, 0.0), ("b", 2, 0.0)], "greater than 0")
    refuse([("a", 1, -1.0), ("b", 2, 1.0)], "0 or more")
    refuse([], "0 teachers")
    with pytest.raises(ConfigError, match="wait"):
        tiny.gkd(tmp_path, zoo.chatml(), None, models=(tiny.tiny_model(zoo.chatml()), [{"name": "x", "wait": 1}]))
    trainer = made(tiny.gkd, tmp_path, [("a", 1, 1.0), ("b", 2, 1.0)], [zoo.turns()] * 2)
    for rows, message in (
        ([{**ROWS[0], "teacher": "c"}], "'c'; there are a, b"),
        ([ROUTED[0], ROWS[1]], "no `teacher`"),
    ):
        with pytest.raises(DataError, match=message):
            loss_and_gradient(trainer, rows)


def blind(order: str, out: Path) -> Any:
    """One teacher that reads everything and one whose window holds no text."""
    entries = {
        "good": {"name": tiny.tiny_model(zoo.turns(), 1), "label": "good"},
        "blind": {"name": tiny.tiny_model(zoo.turns(), 2), "label": "blind", "max_length": 3},
    }
    models = (tiny.tiny_model(zoo.turns(), 0), [entries[name] for name in order.split()])
    return tiny.gkd(out, zoo.turns(), [zoo.turns()] * 2, ROWS, models=models, lmbda=0.0, min_coverage=0.9)


@pytest.mark.parametrize("order", ["good blind", "blind good"])
def test_a_teacher_that_reads_nothing_stops_the_run_by_name(tmp_path: Path, order: str) -> None:
    with pytest.raises(AlignmentError, match=r"Only 0\.0% .* those of teacher 'blind'"):
        blind(order, tmp_path).train()


def test_what_each_teacher_could_read_is_logged_and_tokens_count_once(tmp_path: Path) -> None:
    trainer = blind("blind good", tmp_path)
    trainer.args.min_coverage = 0.0
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["align/coverage/good"] == 1 and entry["align/coverage/blind"] == 0 and entry["align/coverage"] == 0.5
    alone = tiny.gkd(tmp_path, zoo.turns(), zoo.turns(), ROWS, lmbda=0.0)
    alone.train()
    one = next(entry for entry in alone.state.log_history if "loss" in entry)
    for name in ("num_tokens", "completions/tokens_per_byte", "completions/scored"):
        assert entry[name] == one[name]
    assert entry["align/dropped_samples"] == 4  # a sample that one teacher cannot hold
    assert entry["num_tokens"] > 0 and np.isfinite(entry["loss"])


@pytest.mark.parametrize(("entry", "message"), [
    ({"max_length": -5}, "teacher 'a'.*teacher_max_length=-5 is not allowed"),
    ({"max_length": "abc"}, "teacher_max_length"), ({"weight": "much"}, "weight is 'much'"),
    ({"weight": float("nan")}, "weight is nan"), ({"revision": 3}, "revision=3"),
    ({"chat_template_kwargs": "{"}, "is not valid JSON"), ({"init_kwargs": [1]}, "must be a mapping"),
])  # fmt: skip
def test_options_of_one_teacher_have_the_checks_of_the_global_ones(
    tmp_path: Path, entry: dict[str, Any], message: str
) -> None:
    models = (tiny.tiny_model(zoo.chatml()), [{"name": tiny.tiny_model(zoo.turns(), 1), "label": "a", **entry}])
    with pytest.raises(ConfigError, match=message):
        tiny.gkd(tmp_path, zoo.chatml(), [zoo.turns()], models=models)


@pytest.mark.parametrize("rows", [ROWS, ROUTED], ids=["all", "routed"])
def test_a_served_teacher_beside_a_local_one_trains_the_same_in_either_order(
    tmp_path: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has the terms that its teacher can give, and the configuration is what it was."""
    monkeypatch.setattr(served, "STOP_TOLERANCE", 0.0)
    server = TeacherServer(tiny.tiny_model(zoo.turns(), 2), zoo.turns()).start()
    try:
        here, there = {"name": tiny.tiny_model(zoo.turns(), 1), "label": "a"}, {"name": server.url, "label": "b"}
        results = []
        for order in ("ab", "ba"):
            trainer = tiny.minillm(
                tmp_path, zoo.turns(), [zoo.turns()] * 2, rows, num_iterations=1, min_coverage=0.0,
                models=(tiny.tiny_model(zoo.turns(), 0), [here, there] if order == "ab" else [there, here]),
            )  # fmt: skip
            names = {one.label: [term.name for term in one.terms] for one in trainer.comparisons}
            assert names == {"a": ["policy_gradient", "single_step"], "b": ["policy_gradient"]}
            assert trainer.args.single_step_decomposition and trainer.args.teacher_mixed_alpha == 0.2
            results.append(loss_and_gradient(trainer, rows, 4))
        agree(*results)
    finally:
        server.stop()


@pytest.mark.parametrize("streamed", [False, True])
def test_a_row_that_names_no_teacher_among_rows_that_do_is_a_bad_row(
    streamed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [zoo.turns(), zoo.turns()]
    trainer = made(tiny.gkd, tmp_path, [("a", 1, 1.0), ("b", 1, 1.0)], names, on_bad_row="skip")
    rows = Dataset.from_list([*ROUTED, {**ROWS[0], "teacher": None}, *ROUTED])
    usable, _ = trainer.usable_rows(rows.to_iterable_dataset() if streamed else rows, None)
    assert [row["__row__"] for row in usable] == [0, 1, 2, 3, 5, 6, 7, 8]
    assert "train row 4 names no `teacher`, as other rows do; there are a, b" in caplog.text
    late = Dataset.from_list([*({**row, "teacher": None} for row in ROWS * 25), ROUTED[0]])
    usable, _ = trainer.usable_rows(late.to_iterable_dataset(), None)
    assert (
        len(list(usable)) == 100
        and "train row 100 names the teacher 'a', and the rows before it name none" in caplog.text
    )
