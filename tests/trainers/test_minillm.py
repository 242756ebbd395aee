"""MiniLLM on tiny models: each term alone, its sign and its mask, and that the sum is the paper's gradient."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support.tokenizers_zoo as zoo
import torch
from datasets import Dataset
from support import tiny

from diglot.comparisons import Batch
from diglot.errors import ConfigError
from diglot.rollouts import mixture_weight
from diglot.trainers import MiniLLMConfig, MiniLLMTrainer

ROWS = tiny.PROMPT_ROWS
WITHOUT_REWARDS: dict[str, Any] = dict(teacher_mixed_alpha=0.0, num_iterations=1)
PLAIN: dict[str, Any] = dict(**WITHOUT_REWARDS, whiten_advantages=False, length_normalization=False, gamma=1.0)


def window(trainer: MiniLLMTrainer, rows: list[dict[str, Any]], size: int = 4) -> list[Batch]:
    batches = [trainer.data_collator(rows[i : i + size]) for i in range(0, len(rows), size)]
    return [b["batch"] for b in trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)[0]]


def write(trainer: MiniLLMTrainer, *texts: str, stopped: bool = True) -> None:
    """Let the student write these texts, one for each prompt."""
    ending = [trainer.student_renderer.stop_id] if stopped else []
    ids = [np.append(e.ids, ending).astype(np.int64) for e in trainer.student_renderer.encoder.encode(texts)]
    trainer.sample = lambda conversations, prompts, seeds: ids  # type: ignore[method-assign]


def gradient(trainer: MiniLLMTrainer, batches: list[Batch]) -> dict[str, torch.Tensor]:
    trainer.model.zero_grad()
    for batch in batches:
        trainer.compute_loss(trainer.model, {"batch": batch}).backward()
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("teacher", ["chatml", "inst", "turns"])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_trains_with_all_terms(tmp_path: Path, teacher: str, alpha: float) -> None:
    """S7: both with the same and with another tokenizer; reverse KL and the terms are logged."""
    data = Dataset.from_list(tiny.TEXT_ROWS)
    trainer = tiny.minillm(
        tmp_path,
        zoo.chatml(),
        zoo.ALL[teacher](),
        teacher_mixed_alpha=alpha,
        max_steps=4,
        num_iterations=2,
        keywords={"lm_dataset": data},
    )
    assert trainer.comparisons[0].reader.same_vocabulary == (teacher == "chatml")
    trainer.train()
    log = trainer.state.log_history[1]
    assert all(
        math.isfinite(log[k])
        for k in (
            "loss",
            "minillm/log_ratio" if alpha else "reverse_kl",
            "single_step/loss",
            "minillm/lm_loss",
            "minillm/clip_ratio",
        )
    )


@pytest.mark.parametrize(
    ("options", "estimates"),
    [({}, True), ({"teacher_mixed_alpha": 0.3}, False), ({"temperature": 0.7}, False), ({"top_k": 5}, False)],
)
def test_only_the_students_own_draws_are_called_a_divergence(
    tmp_path: Path, options: dict[str, Any], estimates: bool
) -> None:
    made = {**PLAIN, "max_steps": 1, "log_rollouts": 4, **options}
    trainer = tiny.minillm(tmp_path, zoo.chatml(), zoo.turns(), **made)
    trainer.train()
    log = trainer.state.log_history[0]
    own, other = {"reverse_kl", "rollouts/kl_nats_per_byte"}, {"minillm/log_ratio", "rollouts/log_ratio_nats_per_byte"}
    assert own & set(log) == (own if estimates else set()) and other & set(log) == (set() if estimates else other)


def test_the_log_ratio_is_of_text_that_both_sides_read(tmp_path: Path) -> None:
    """A teacher that is the student, and whose reading is cut: no part of the text is the less likely to it."""
    models = tiny.tiny_model(zoo.chatml(), 0), tiny.tiny_model(zoo.chatml(), 0)
    options = {**PLAIN, "vocabulary_path": "general", "max_steps": 1, "min_coverage": 0.0}
    trainer = tiny.minillm(tmp_path, zoo.chatml(), zoo.chatml(), ROWS, models=models, **options)
    samples = trainer.data_collator(ROWS)["samples"]
    longest = max(len(trainer.student_renderer.prompt_ids(s.conversation)) for s in samples)
    trainer.comparisons[0].reader.teacher_max_length = longest + 3
    write(trainer, *["one two three four"] * 4)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["align/coverage"] < 0.9 and abs(log["reverse_kl"]) < 1e-3


@pytest.mark.parametrize(("teacher", "share"), [("chatml", 0.7), ("nfc", 0.9)])
def test_lowers_the_reverse_kl(tmp_path: Path, teacher: str, share: float) -> None:
    trainer = tiny.minillm(
        tmp_path,
        zoo.chatml(),
        zoo.ALL[teacher](),
        ROWS[:4],
        teacher_mixed_alpha=0.0,
        max_steps=60,
        min_coverage=0.0,  # a random student writes broken characters now and then, and nothing else
        num_iterations=2,
        learning_rate=1e-2,
        max_completion_length=12,
    )
    trainer.eval_dataset = Dataset.from_list(ROWS * 16)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < share * before


def test_policy_gradient_alone_lowers_the_reverse_kl(tmp_path: Path) -> None:
    """The long part with its own step, no dense term: its sign is right if the divergence falls."""
    trainer = tiny.minillm(
        tmp_path,
        zoo.chatml(),
        zoo.nfc(),
        ROWS[:2],
        teacher_mixed_alpha=0.0,
        max_steps=80,
        num_iterations=1,
        single_step_decomposition=False,
        learning_rate=5e-3,
        max_completion_length=4,
        num_generations=16,
        gamma=1.0,
        length_normalization=False,
    )
    trainer.eval_dataset = Dataset.from_list(ROWS[:2] * 16)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before


def test_single_step_part_is_the_exact_reverse_kl_on_equal_vocabularies(tmp_path: Path) -> None:
    """To 1e-6, against the naive formula on whole logits; prompt and padding have no part in it (W49)."""
    tokenizer = zoo.chatml()
    student, teacher = tiny.tiny_model(tokenizer, 0).double(), tiny.tiny_model(tokenizer, 1).double()
    options = {**WITHOUT_REWARDS, "rkl_advantage": False}
    trainer = tiny.minillm(tmp_path, tokenizer, tokenizer, models=(student, teacher), **options)
    write(trainer, "hello", "one two three, as you asked")
    (batch,) = window(trainer, ROWS[:2])
    loss = trainer.compute_loss(trainer.model, {"batch": batch}).item()

    derivative = gradient(trainer, [batch])
    side = batch.student
    student.zero_grad()
    p = student(side.input_ids, attention_mask=side.attention_mask).logits.log_softmax(-1)
    with torch.no_grad():
        q = teacher(
            batch.views[0].read.teacher.input_ids, attention_mask=batch.views[0].read.teacher.attention_mask
        ).logits.log_softmax(-1)
    mask = torch.zeros(side.input_ids.shape, dtype=torch.bool)
    for b, pair in enumerate(batch.pairs):  # by hand: the completion's positions, each predicted one position before
        mask[b, pair.student.prompt_length - 1 : len(pair.student.ids) - 1] = True
    expected = ((p.exp() * (p - q)).sum(-1) * mask).sum() / mask.sum()
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-9)
    assert all(
        torch.allclose(derivative[n], x.grad, atol=1e-9) for n, x in student.named_parameters() if x.grad is not None
    )


def test_policy_gradient_is_the_papers_on_equal_vocabularies(tmp_path: Path) -> None:
    """-1/n sum_t R_t grad log q(y_t), R_t the sum of later log-ratios, written with a loop."""
    tokenizer = zoo.chatml()
    student, teacher = tiny.tiny_model(tokenizer, 0).double(), tiny.tiny_model(tokenizer, 1).double()
    trainer = tiny.minillm(
        tmp_path,
        tokenizer,
        tokenizer,
        models=(student, teacher),
        single_step_decomposition=False,
        **{**PLAIN, "gamma": 0.9},
    )
    write(trainer, "hello you", "one two three")
    batches = window(trainer, ROWS[:2])
    derivative = gradient(trainer, batches)

    student.zero_grad()
    loss, count = torch.zeros((), dtype=torch.float64), 0
    for pair in batches[0].pairs:
        ids, start = torch.tensor(pair.student.ids)[None], pair.student.prompt_length
        logps = [
            m(ids).logits[0, start - 1 : -1].log_softmax(-1).gather(1, ids[0, start:, None])[:, 0]
            for m in (student, teacher)
        ]
        rewards = (logps[1] - logps[0]).detach()
        for t in range(len(rewards)):
            later = sum(0.9 ** (k - t) * rewards[k] for k in range(t, len(rewards)))
            loss, count = loss - later * logps[0][t], count + 1
    (loss / count).backward()
    for name, p in student.named_parameters():
        if p.grad is not None:
            assert torch.allclose(derivative[name], p.grad, atol=1e-5, rtol=1e-4), name


def test_with_the_dense_term_the_long_part_starts_one_step_later(tmp_path: Path) -> None:
    """Else each step's own reward would be counted twice (paper, eq. 5)."""
    tokenizer = zoo.chatml()
    trainer = tiny.minillm(tmp_path, tokenizer, tokenizer, **PLAIN)
    write(trainer, "hello you", stopped=False)
    (batch,) = window(trainer, ROWS[:1])
    rollout = batch.views[0].rollout
    assert rollout is not None and rollout.advantage is not None
    assert rollout.advantage[-1] == 0
    assert rollout.advantage[0].item() == pytest.approx((rollout.logp_t - rollout.logp_old)[1:].sum().item(), rel=1e-4)


def test_whitened_advantages_have_mean_zero_and_variance_one_over_the_window(tmp_path: Path) -> None:
    trainer = tiny.minillm(tmp_path, zoo.chatml(), zoo.inst(), **{**PLAIN, "whiten_advantages": True})
    batches = window(trainer, ROWS, 2)
    views = [b.views[0] for b in batches]
    values = torch.cat([v.rollout.advantage[torch.from_numpy(v.read.written.usable_s)] for v in views])  # type: ignore
    assert len(batches) == 4
    assert values.mean().item() == pytest.approx(0, abs=1e-4) and values.std(correction=0).item() == pytest.approx(
        1, abs=1e-3
    )


def test_w5_the_split_of_a_window_changes_nothing(tmp_path: Path) -> None:
    results = []
    for size in (4, 2, 1):
        trainer = tiny.minillm(tmp_path, zoo.chatml(), zoo.inst(), **{**PLAIN, "whiten_advantages": True})
        write(trainer, "hello", "one two three", "as you asked", "x = 1")
        results.append(gradient(trainer, window(trainer, ROWS[:4], size)))
    for result in results[1:]:
        assert all(torch.allclose(result[n], results[0][n], atol=1e-5) for n in result)


def test_w53_unequal_vocabularies_are_compared_through_bytes(tmp_path: Path) -> None:
    """No shape error with the single step, no silent training on wrong ids without it."""
    for single in (True, False):
        trainer = tiny.minillm(tmp_path, zoo.chatml(), zoo.inst(), single_step_decomposition=single, **PLAIN)
        write(trainer, "hello there")
        (batch,) = window(trainer, ROWS[:1])
        vocabulary = trainer.comparisons[0].teacher.renderer.vocabulary
        read = vocabulary.bytes_of(batch.views[0].read.teacher.targets.numpy())
        assert read == b"hello there"


def test_inner_epochs_reuse_the_completions_and_their_old_log_probs(tmp_path: Path) -> None:
    """Three optimizer steps on one set of completions; the ratio leaves 1 after the first."""
    trainer = tiny.minillm(tmp_path, zoo.chatml(), zoo.inst(), max_steps=6, num_iterations=3, teacher_mixed_alpha=0.0)
    held: list[Any] = []
    original = trainer.prepare

    def spy(rows: Any) -> Any:
        held.append(original(rows))
        return held[-1]

    trainer.prepare = spy  # type: ignore[method-assign]
    trainer.train()
    assert held[0] is held[1] is held[2] and held[3] is held[4] is held[5] and held[0] is not held[3]


def test_the_teacher_is_asked_once_for_all_inner_epochs(tmp_path: Path) -> None:
    """What the single step compares with is the teacher's alone, and stays what it was while the student moves."""
    trainer = tiny.minillm(tmp_path, zoo.chatml(), zoo.inst(), num_iterations=3, teacher_mixed_alpha=0.0)
    passes: list[int] = []
    trainer.comparisons[0].teacher.model.register_forward_hook(lambda *_: passes.append(1))
    batches = window(trainer, ROWS[:4])
    calls = len(passes)
    for _ in range(3):
        gradient(trainer, batches)
    assert len(passes) == calls > 0


def test_each_window_of_data_comes_once_per_inner_epoch_and_every_row_is_seen(tmp_path: Path) -> None:
    from diglot.batches.windows import RepeatedWindows

    sampler = RepeatedWindows(length=10, window=4, repeats=3, seed=0)
    order = list(sampler)
    assert len(order) == len(sampler) == 3 * 12
    for start in range(0, 36, 12):
        assert order[start : start + 4] == order[start + 4 : start + 8] == order[start + 8 : start + 12]
    assert set(order) == set(range(10))
    sampler.set_epoch(1)
    assert list(sampler) != order
    small = list(RepeatedWindows(length=2, window=5, repeats=1, seed=0))
    assert len(small) == 5 and set(small) == {0, 1}


def test_every_term_can_be_switched_off(tmp_path: Path) -> None:
    """Loss without a term differs; without all of them the config is refused."""
    losses = {}
    for name, options in {
        "all": {},
        "no pg": {"rkl_advantage": False},
        "no single": {"single_step_decomposition": False},
        "no lm": {"lm_coef": 0.0},
    }.items():
        trainer = tiny.minillm(
            tmp_path,
            zoo.chatml(),
            zoo.inst(),
            keywords={"lm_dataset": Dataset.from_list(tiny.TEXT_ROWS)},
            **({**PLAIN, **options} if name != "no pg" else {**WITHOUT_REWARDS, **options}),
        )
        write(trainer, "hello you two")
        (batch,) = window(trainer, ROWS[:1])
        losses[name] = trainer.compute_loss(trainer.model, {"batch": batch}).item()
    assert len({round(v, 6) for v in losses.values()}) == 4
    with pytest.raises(ConfigError, match="rkl_advantage"):
        MiniLLMConfig(output_dir=str(tmp_path), rkl_advantage=False, single_step_decomposition=False)


def test_lm_loss_is_the_cross_entropy_of_the_reference_tokens(tmp_path: Path) -> None:
    """Against the model's own loss on the same padded text; its sign pulls the loss down."""
    trainer = tiny.minillm(
        tmp_path,
        zoo.chatml(),
        zoo.inst(),
        keywords={"lm_dataset": Dataset.from_list(tiny.TEXT_ROWS)},
        lm_coef=1.0,
        **PLAIN,
    )
    write(trainer, "a", "b", "c", "d")
    (batch,) = window(trainer, ROWS[:4])
    with_lm = trainer.compute_loss(trainer.model, {"batch": batch}).item()
    assert batch.reference is not None
    side, batch.reference = batch.reference.student, None
    without = trainer.compute_loss(trainer.model, {"batch": batch}).item()
    logits = trainer.model(side.input_ids, attention_mask=side.attention_mask).logits.log_softmax(-1).flatten(0, 1)
    expected = -logits[side.rows, side.targets].mean().item()
    assert with_lm - without == pytest.approx(expected, rel=1e-4)


# ---- teacher-mixed sampling ------------------------------------------------------------------------------------------


def test_mixture_draws_tokens_from_the_mixture_of_both_distributions(tmp_path: Path) -> None:
    """The first token's frequencies follow alpha * teacher + (1 - alpha) * student, not the student."""
    from diglot.rollouts import TeacherMixture

    tokenizer = zoo.chatml()
    trainer = tiny.minillm(tmp_path, tokenizer, tokenizer, teacher_mixed_alpha=0.5)
    from diglot.data import to_sample

    conversation = to_sample(ROWS[0], "row").conversation
    prompt = trainer.student_renderer.prompt_ids(conversation)
    number = 4000
    mixture = TeacherMixture(trainer.comparisons[0].teacher.model, [prompt] * number, 0, 0.5)
    ids = trainer.sampler(trainer.model, [prompt] * number, max_new_tokens=1, seed=1, processors=[mixture])
    counts = torch.bincount(torch.tensor([int(i[0]) for i in ids]), minlength=len(tokenizer)) / number
    x = torch.tensor(prompt)[None]
    with torch.no_grad():
        p, q = (m(x).logits[0, -1].softmax(-1) for m in (trainer.model, trainer.comparisons[0].teacher.model))
    expected = 0.5 * p + 0.5 * q
    distance = (counts - expected).abs().sum().item() / 2
    assert distance < 0.15
    assert (counts - p).abs().sum().item() / 2 > 2 * distance


def test_mixture_follows_the_teachers_cache_over_steps(tmp_path: Path) -> None:
    """At alpha near 1 a greedy reading of the mixture is the teacher's own greedy text."""
    from transformers import GenerationConfig, LogitsProcessorList

    from diglot.rollouts import TeacherMixture

    tokenizer = zoo.chatml()
    student, teacher = tiny.tiny_model(tokenizer, 0), tiny.tiny_model(tokenizer, 1)
    prompts = [np.array([10, 20, 30]), np.array([40, 50])]
    mixture = TeacherMixture(teacher, prompts, 0, 1 - 1e-7)
    config = GenerationConfig(do_sample=False, max_new_tokens=6, pad_token_id=0, eos_token_id=None)
    ids, mask = torch.tensor([[10, 20, 30], [0, 40, 50]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    mixed = student.generate(
        ids, attention_mask=mask, generation_config=config, logits_processor=LogitsProcessorList([mixture])
    )
    own = teacher.generate(ids, attention_mask=mask, generation_config=config)
    assert mixed.tolist() == own.tolist()


def test_importance_weights_are_the_ratio_to_the_mixture_and_bounded(tmp_path: Path) -> None:
    trainer = tiny.minillm(tmp_path, zoo.chatml(), zoo.chatml(), **PLAIN)
    write(trainer, "hello you")
    (batch,) = window(trainer, ROWS[:1])
    rollout = batch.views[0].rollout
    assert rollout is not None
    result = mixture_weight(rollout.logp_old, rollout.logp_t, batch.views[0].read.alignment, 0.25)
    p, q = rollout.logp_old.exp(), rollout.logp_t.exp()
    assert torch.allclose(result, p / (0.25 * q + 0.75 * p), rtol=1e-4)
    assert (result <= 1 / 0.75 + 1e-5).all()


def test_prefix_weights_fade_to_one_where_no_teacher_prefix_reaches(tmp_path: Path) -> None:
    trainer = tiny.minillm(tmp_path, zoo.chatml(), zoo.inst(), **PLAIN)
    write(trainer, "hello you two and three")
    (batch,) = window(trainer, ROWS[:1])
    rollout = batch.views[0].rollout
    assert rollout is not None
    result = mixture_weight(rollout.logp_old, rollout.logp_t, batch.views[0].read.alignment, 0.25, max_new_tokens=3)
    chunk = batch.views[0].read.alignment.chunk_s
    before = (batch.views[0].read.alignment.count_s.cumsum(0) - batch.views[0].read.alignment.count_s)[chunk]
    assert torch.allclose(result[before >= 3], torch.ones_like(result[before >= 3]))
    assert (result[before < 3] != 1).any()


def test_a_teacher_prefix_is_read_in_the_students_ids(tmp_path: Path) -> None:
    """With alpha near 1 completions begin with teacher text, in student ids, and go on to the limit."""
    trainer = tiny.minillm(
        tmp_path,
        zoo.chatml(),
        zoo.inst(),
        teacher_mixed_alpha=0.999,
        max_completion_length=12,
        **{k: v for k, v in PLAIN.items() if k != "teacher_mixed_alpha"},
    )
    batches = window(trainer, ROWS)
    for pair in (p for b in batches for p in b.pairs):
        completion = pair.student.ids[pair.student.prompt_length :]
        assert len(completion) <= 12
        text = trainer.student_renderer.vocabulary.bytes_of(pair.student.ids[pair.student.segment >= 0])
        assert text == pair.student.segment_bytes[-1]
    assert all(v.rollout is not None and v.rollout.weight is not None for b in batches for v in b.views)
