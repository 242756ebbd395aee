"""Every objective in both trainers: it trains, is counted and logged, and its loss does not depend on the split."""

from __future__ import annotations

import copy
import inspect
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import support.tokenizers_zoo as zoo
import torch
from support import tiny
from support.scored import pair as scored_pair
from torch import Tensor

from diglot.comparisons import Batch, ModelScores, Term, View, check_level, scores_of
from diglot.comparisons.auto import auto_objective
from diglot.errors import ConfigError, TeacherError
from diglot.objectives import OBJECTIVES, Level, make_objective, options_of
from diglot.rendering import Role

CROSS = sorted(set(OBJECTIVES) - {"jsd"})
BALANCED = {"xtoken_p", "xtoken_h"}  # scaled to the cross-entropy of each micro-batch: depends on the split


@pytest.mark.parametrize("name", CROSS)
@pytest.mark.parametrize("make", [tiny.gkd, tiny.minillm])
def test_every_objective_trains_in_both_trainers(tmp_path: Path, make: Any, name: str) -> None:
    options = {"lmbda": 0.5} if make is tiny.gkd else {"num_iterations": 2}
    trainer = make(tmp_path, zoo.chatml(), zoo.turns(), tiny.CHAT_ROWS, objective=[{"name": name}], **options)
    before = tiny.parameters(trainer.model)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2 and all(math.isfinite(entry["loss"]) for entry in logged)
    assert any(f"{name}/loss" in entry for entry in logged)
    after = tiny.parameters(trainer.model)
    assert any(not (before[key] == after[key]).all() for key in before)


def _window(trainer: Any, size: int) -> list[Batch]:
    rows = tiny.CHAT_ROWS[:4]
    batches = [trainer.data_collator(rows[i : i + size]) for i in range(0, len(rows), size)]
    return [b["batch"] for b in trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)[0]]


def _loss_and_gradient(trainer: Any, batches: list[Batch]) -> tuple[float, Tensor]:
    trainer.model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, {"batch": batch})
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.ravel() for p in trainer.model.parameters()])


@pytest.mark.parametrize("name", CROSS)
def test_no_objective_reads_reasoning_that_is_not_to_be_scored(tmp_path: Path, name: str) -> None:
    reply = "<think>one two three one two</think>hello there"
    rows = [{"messages": [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": reply}]}]
    read = {}
    for scored in (True, False):
        options: dict[str, Any] = dict(objective=name, score_reasoning=scored, lmbda=0.0, min_coverage=0.0)
        trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.turns(), rows, **options)
        batch = trainer.get_batch_samples(iter([trainer.data_collator(rows)]), 1, trainer.args.device)[0][0]["batch"]
        hidden = trainer.hidden_at_rows(trainer.model, batch.student).detach().requires_grad_()
        trainer.hidden_at_rows = lambda model, side, hidden=hidden: hidden  # type: ignore[method-assign]
        trainer.compute_loss(trainer.model, {"batch": batch}).backward()
        assert hidden.grad is not None
        size = hidden.grad.abs().amax(-1)
        inside = torch.from_numpy(batch.student.role == Role.REASONING)
        assert size[~inside].max() > 0
        read[scored] = float(size[inside].max())
    assert read[True] > 0 and read[False] == 0


@pytest.mark.parametrize("name", sorted(set(CROSS) - BALANCED))
def test_loss_and_gradient_do_not_depend_on_the_split_nor_on_the_rows_of_a_block(tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = dict(lmbda=0.0, objective=name)
    whole = tiny.gkd(tmp_path, zoo.chatml(), zoo.turns(), **options)
    split = tiny.gkd(tmp_path, zoo.chatml(), zoo.turns(), rows_per_chunk=5, **options)
    expected, gradient = _loss_and_gradient(whole, _window(whole, 4))
    result, other = _loss_and_gradient(split, _window(split, 1))
    assert result == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert (gradient - other).abs().max() <= 2e-5 * gradient.abs().max()


def _scores(trainer: Any) -> tuple[ModelScores, View, Tensor]:
    (batch,) = _window(trainer, 4)
    hidden, view = trainer.hidden_at_rows(trainer.model, batch.student), batch.views[0]
    return scores_of(batch, view, hidden, trainer.student_head), view, hidden


def test_scores_of_the_teacher_are_those_of_its_whole_rows(tmp_path: Path) -> None:
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), lmbda=0.0, kd_temperature=1.7, rows_per_chunk=6)
    scores, view, _ = _scores(trainer)
    rows = (trainer.comparisons[0].teacher.head(view.answers.hidden) / 1.7).log_softmax(-1)
    order = torch.from_numpy(trainer.comparisons[0].teacher.renderer.vocabulary.trie.sorted_ids)
    draw = torch.Generator().manual_seed(0)
    token = torch.randint(len(rows), (40,), generator=draw)
    low = torch.randint(len(order) - 30, (40,), generator=draw)
    high = low + torch.randint(1, 30, (40,), generator=draw)
    expected = torch.stack([rows[t, order[a:b]].logsumexp(-1) for t, a, b in zip(token, low, high, strict=True)])
    torch.testing.assert_close(scores.teacher_ranges(token, low, high), expected, rtol=1e-5, atol=1e-5)
    ids = torch.randint(rows.shape[1], (40,), generator=draw)
    torch.testing.assert_close(scores.teacher_logps(token, ids), rows[token, ids], rtol=1e-5, atol=1e-5)
    assert not scores.teacher_logps(token, ids).requires_grad


def test_boundary_masses_are_those_of_word_starts_and_stop(tmp_path: Path) -> None:
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), lmbda=0.0)
    scores, _, hidden = _scores(trainer)
    vocabulary = trainer.student_renderer.vocabulary
    starts = [i for i in range(len(vocabulary)) if vocabulary.token(i)[:1] in (b" ", b"\n", b"\t", b"\r")]
    ids = torch.tensor([*starts, *trainer.student_renderer.stop_ids])
    rows = trainer.student_head(hidden).log_softmax(-1)
    torch.testing.assert_close(scores.boundaries[0], rows[:, ids].logsumexp(-1))
    assert scores.boundaries[0].requires_grad and not scores.boundaries[1].requires_grad


def test_a_balanced_objective_weighs_as_much_as_the_cross_entropy_of_its_rows(tmp_path: Path) -> None:
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), lmbda=0.0, objective="xtoken_p")
    scores, view, _ = _scores(trainer)
    rows = view.plans["xtoken_p"].student  # type: ignore[attr-defined]
    surprisal = -scores.student_text(1.0)[rows].sum() / len(rows)
    loss, _ = _loss_and_gradient(trainer, _window(trainer, 4))
    assert loss == pytest.approx(2 * surprisal.item(), rel=1e-4)


def test_minillm_adds_terms_to_the_policy_gradient_with_their_own_weights(tmp_path: Path) -> None:
    losses = {}
    for name, objective in {
        "none": [{"name": "ce", "weight": 0.0}],
        "ce": [{"name": "ce", "weight": 1.0}],
        "both": [{"name": "ce", "weight": 2.0}, {"name": "shared_prefix", "weight": 0.5}],
        "prefix": [{"name": "shared_prefix", "weight": 1.0}],
    }.items():
        trainer = tiny.minillm(tmp_path, zoo.chatml(), zoo.inst(), objective=objective, teacher_mixed_alpha=0.0)
        losses[name] = _loss_and_gradient(trainer, _window(trainer, 4))[0]
    parts = {name: losses[name] - losses["none"] for name in ("ce", "prefix")}
    assert parts["ce"] > 0.1 and parts["prefix"] > 0.01
    assert losses["both"] - losses["none"] == pytest.approx(2 * parts["ce"] + 0.5 * parts["prefix"], rel=1e-4)


def test_in_minillm_only_a_step_whose_targets_depend_on_the_past_is_subtracted(tmp_path: Path) -> None:
    past = {"name": "covering", "written_apart": False}
    steps = ([past], True), ([{"name": "covering"}], False), ([{"name": "strict", "top_k": 0, "residual": True}], False)
    for objective, subtracted in (*steps, ("auto", True)):
        trainer = tiny.minillm(tmp_path, zoo.chatml(), zoo.inst(), objective=objective)
        (batch,) = _window(trainer, 4)
        rollout = batch.views[0].rollout
        assert rollout is not None and (rollout.explained is not None) == subtracted
        assert rollout.explained is None or rollout.explained.isfinite().any()


def test_a_reference_teacher_changes_the_rewards_and_both_references_are_asked(tmp_path: Path) -> None:
    for name, tokenizer, seed in (("start", zoo.chatml(), 0), ("reference", zoo.inst(), 7)):
        tiny.tiny_model(tokenizer, seed).save_pretrained(tmp_path / name)
    options = dict(
        objective=[{"name": "span", "reference_alpha": 0.5}],
        reference_teacher_model_name_or_path=str(tmp_path / "reference"),
        reference_model_name_or_path=str(tmp_path / "start"),
    )
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), lmbda=0.0, **options)
    (batch,), objective = _window(trainer, 4), trainer.comparisons[0].terms[0].objective
    head, view = trainer.student_head, batch.views[0]
    path = objective.path(scores_of(batch, view, trainer.hidden_at_rows(trainer.model, batch.student), head))
    assert path.logp_reference_s is not None and path.logp_reference_t is not None
    torch.testing.assert_close(path.logp_reference_s, path.logp_s.detach())  # the student has not moved yet
    assert not torch.allclose(path.logp_reference_t, path.logp_t)
    trainer.train()
    moved = objective.path(scores_of(batch, view, trainer.hidden_at_rows(trainer.model, batch.student), head))
    assert moved.logp_reference_s is not None
    torch.testing.assert_close(moved.logp_reference_s, path.logp_reference_s)
    assert not torch.allclose(moved.logp_s, moved.logp_reference_s)


def test_a_reference_that_is_missing_or_reads_other_tokens_is_an_error_at_the_start(tmp_path: Path) -> None:
    objective = [{"name": "span", "reference_alpha": 0.5}]
    with pytest.raises(ConfigError, match="reference_teacher_model_name_or_path"):
        tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), objective=copy.deepcopy(objective))
    small = tiny.tiny_model(zoo.inst(), vocab_size=50)
    small.save_pretrained(tmp_path / "small")
    tiny.tiny_model(zoo.chatml()).save_pretrained(tmp_path / "start")
    with pytest.raises(ConfigError, match=r"50 embedding rows"):
        tiny.gkd(
            tmp_path,
            zoo.chatml(),
            zoo.inst(),
            objective=objective,
            reference_teacher_model_name_or_path=str(tmp_path / "small"),
            reference_model_name_or_path=str(tmp_path / "start"),
        )


def test_an_objective_may_be_named_twice_and_an_empty_list_is_refused(tmp_path: Path) -> None:
    twice = [{"name": "strict", "beta": 0.0}, {"name": "strict", "beta": 1.0}]
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), lmbda=0.0, objective=twice)
    assert [term.name for term in trainer.comparisons[0].terms] == ["strict", "strict#2"]
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert logged["loss"] == pytest.approx(logged["strict/loss"] + logged["strict#2/loss"], rel=1e-4)
    with pytest.raises(ConfigError, match="empty list"):
        tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), objective=[])


def test_the_share_of_noncanonical_tokens_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written letter by letter, a text has tokens that its tokenizer would not give; as a reference it has none."""
    text, shares = b"the river", {}
    for lmbda in (0.0, 1.0):
        trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), lmbda=lmbda, max_steps=1)
        vocabulary = trainer.student_renderer.vocabulary
        letter = {vocabulary.token(i): i for i in range(len(vocabulary))}
        spelt = np.array([*(letter[text[k : k + 1]] for k in range(len(text))), trainer.student_renderer.stop_id])
        monkeypatch.setattr(trainer, "sample", lambda conversations, prompts, seeds, ids=spelt: [ids for _ in prompts])
        trainer.train()
        shares[lmbda] = next(e for e in trainer.state.log_history if "loss" in e)["align/noncanonical"]
    own = trainer.student_renderer.encoder.encode([text.decode()])[0]
    whole = {(end - 1, int(i)) for end, i in zip(own.ends, own.ids, strict=True) if vocabulary.lengths[i] == 1}
    canonical = sum((k, int(i)) in whole for k, i in enumerate(spelt[:-1]))
    assert shares == {0.0: 0.0, 1.0: pytest.approx((len(text) - canonical) / len(spelt))}
    assert shares[1.0] > 0.5


def test_options_can_raise_what_an_objective_needs_of_the_teacher() -> None:
    pair = scored_pair("chatml", "inst")
    plain = [Term("alm", 1.0, make_objective("alm", pair))]
    check_level(plain, Level.TEXT_LOGPROBS)
    outcome = [Term("alm", 1.0, make_objective("alm", pair, chunks="outcome"))]
    check_level(outcome, Level.HIDDEN)
    with pytest.raises(TeacherError, match=r"'alm' needs HIDDEN of the teacher, which offers TEXT_LOGPROBS.*span"):
        check_level(outcome, Level.TEXT_LOGPROBS)


@pytest.mark.parametrize("rows", [(0, 9), (9, 0)])
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_padding_of_either_embedding_is_no_obstacle(tmp_path: Path, name: str, rows: tuple[int, int]) -> None:
    """Equal vocabularies whose models have embeddings of unequal size."""
    models = tuple(tiny.tiny_model(zoo.chatml(), seed, padding_rows=n) for seed, n in enumerate(rows))
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.chatml(), models=models, objective=name, lmbda=0.0, max_steps=1)
    trainer.train()
    logged = next(e for e in trainer.state.log_history if "loss" in e)
    assert math.isfinite(logged["loss"]) and logged["align/coverage"] == 1


BETAS = sorted(name for name in CROSS if "beta" in options_of(name))


@pytest.mark.parametrize("name", BETAS)
def test_beta_reaches_every_objective_that_has_one_unless_its_entry_gives_one(tmp_path: Path, name: str) -> None:
    def betas(make: Any, objective: Any, **options: Any) -> list[float]:
        trainer = make(tmp_path, zoo.chatml(), zoo.inst(), objective=objective, min_coverage=0.0, **options)
        return [term.objective.beta for term in trainer.comparisons[0].terms if hasattr(term.objective, "beta")]

    assert betas(tiny.gkd, [name, {"name": name, "beta": 0.25}], beta=1.0) == [1.0, 0.25]
    assert betas(tiny.minillm, name) == [1.0]
    own = inspect.signature(OBJECTIVES[name]).parameters["beta"].default
    assert betas(tiny.gkd, name) == [own]
    assert betas(tiny.gkd, name, beta=0.5) == [0.5]


@pytest.mark.parametrize(("options", "message"), [
    ({"objective": "span", "beta": 1.0}, "beta=1.0 has no part in objective 'span'"),
    ({"objective": ["span", "alm"], "beta": 0.5}, "beta=0.5 has no part in objective 'span', 'alm'"),
    ({"objective": ["span", "bpm"], "strict_top_k": 4}, "strict_top_k=4 has no part in objective 'span', 'bpm'"),
    ({"objective": "alm", "kd_temperature": 2.0}, "kd_temperature=2.0 has no part in objective 'alm'"),
])  # fmt: skip
def test_an_option_that_no_objective_can_use_is_refused_by_name(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), **options)


def test_there_is_one_temperature(tmp_path: Path) -> None:
    """It divides logits once, also of an objective that multiplies by its square; `jsd` has none of its own."""
    losses = {}
    for temperature in (1.0, 3.0):
        for name in ("uld", "jsd", "xtoken_h"):
            tokenizers = zoo.turns(), zoo.turns()
            trainer = tiny.gkd(tmp_path, *tokenizers, lmbda=0.0, objective=name, kd_temperature=temperature)
            losses[name, temperature] = _loss_and_gradient(trainer, _window(trainer, 4))[0]
            if name == "xtoken_h":
                assert trainer.comparisons[0].terms[0].objective.kd_temperature == temperature  # type: ignore
    assert losses["uld", 1.0] != losses["uld", 3.0] and losses["jsd", 1.0] != losses["jsd", 3.0]
    with pytest.raises(ConfigError, match="no option 'kd_temperature'"):
        tiny.gkd(tmp_path, zoo.turns(), zoo.turns(), objective=[{"name": "jsd", "kd_temperature": 2.0}])


@pytest.mark.parametrize("objective", ["auto", ["auto"], ["auto", {"name": "alm", "weight": 0.1}]])
def test_auto_is_the_exact_single_step_in_minillm_also_in_a_list(tmp_path: Path, objective: Any) -> None:
    trainer = tiny.minillm(tmp_path, zoo.chatml(), zoo.inst(), objective=objective, teacher_mixed_alpha=0.0)
    gradient, step, *others = trainer.comparisons[0].terms
    assert gradient.name == "policy_gradient" and step.name == "single_step" and step.objective.is_single_step
    assert [term.name for term in others] == (["alm"] if len(objective) == 2 else [])


def test_auto_says_what_it_took_and_why(tmp_path: Path) -> None:
    for teacher, name, words in (
        ("chatml", "jsd", "one table of ids"),
        ("turns", "covering", "the vocabularies differ"),
    ):
        (comparison,) = tiny.gkd(tmp_path, zoo.chatml(), zoo.ALL[teacher](), objective="auto").comparisons
        choice = auto_objective(comparison)
        assert choice.name == name == comparison.terms[0].name and words in choice.reason


@pytest.mark.parametrize(
    ("level", "same", "name"),
    [
        (Level.TEXT_LOGPROBS, False, "span"),
        (Level.TOP_K, False, "span"),
        (Level.TEXT_LOGPROBS, True, "span"),
        (Level.TOP_K, True, "top_k"),
    ],
)
def test_auto_takes_nothing_across_tokenizers_that_compares_tokens_cut_alike_alone(
    tmp_path: Path, level: Level, same: bool, name: str
) -> None:
    """`top_k` took a student's sums from half of them right to none (benchmarks/sums.py)."""
    (comparison,) = tiny.gkd(tmp_path, zoo.chatml(), (zoo.chatml if same else zoo.turns)()).comparisons
    choice = auto_objective(replace(comparison, teacher=SimpleNamespace(level=level, name="far")))
    assert choice.name == name and choice.reason.startswith("far gives ")


@pytest.mark.parametrize("own", [True, False])
def test_a_student_is_anchored_to_the_cut_of_given_texts_alone(tmp_path: Path, own: bool) -> None:
    """On its own samples the surprisal of its cut is a score function: noise, without a direction."""
    losses = []
    for anchor in (0.0, 1.0):
        objective = [{"name": "byte", "anchor": anchor}]
        options = {"lmbda": float(own), "max_steps": 1, "objective": objective}
        trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.turns(), **options)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert (losses[0] == losses[1]) is own


@pytest.mark.parametrize(
    ("make", "options", "share"),
    [(tiny.gkd, {"lmbda": 1.0}, "100%"), (tiny.gkd, {"lmbda": 0.25}, "25%"), (tiny.minillm, {}, "100%")],
)
def test_imitation_of_the_students_own_samples_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Any, options: dict[str, Any], share: str
) -> None:
    mixed = [{"name": "strict"}, {"name": "ce", "weight": 0.5}]
    make(tmp_path, zoo.chatml(), zoo.turns(), tiny.CHAT_ROWS, objective=mixed, **options)
    assert f"in {share} of the steps that is the student's own sample" in caplog.text


def test_imitation_of_given_texts_is_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.gkd(tmp_path, zoo.chatml(), zoo.turns(), tiny.CHAT_ROWS, objective=["strict", "ce"], lmbda=0.0)
    assert "own sample" not in caplog.text
