"""GKD on tiny models with real (small) tokenizers: what it compares, over what it averages, and what it refuses."""

from __future__ import annotations

import json
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
from diglot.errors import AlignmentError, ConfigError, DataError, TeacherError, VocabularyError
from diglot.trainers import GKDConfig, GKDTrainer

CHAT = tiny.CHAT_ROWS


def window(trainer: GKDTrainer, rows: list[dict[str, Any]], size: int = 4) -> list[Batch]:
    """One window of micro-batches of `size`, through the trainer's own path."""
    batches = [trainer.data_collator(rows[i : i + size]) for i in range(0, len(rows), size)]
    return [b["batch"] for b in trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)[0]]


def gradients(trainer: GKDTrainer, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of a window and its gradient."""
    trainer.model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, {"batch": batch})
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-6) -> bool:
    assert a.keys() == b.keys()
    return all(torch.allclose(a[n], b[n], atol=tolerance, rtol=1e-4) for n in a)


# ---- cross-tokenizer training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["inst", "turns", "unigram", "nfc", "unigram_nfkc"])
@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_trains_across_tokenizers_of_every_kind(tmp_path: Path, teacher: str, lmbda: float) -> None:
    """S13, S15: finite loss, moved parameters, the metrics users grep."""
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.ALL[teacher](), lmbda=lmbda, min_coverage=0.0)
    before = tiny.parameters(trainer.model)
    trainer.train()
    log = trainer.state.log_history[0]
    assert math.isfinite(log["loss"]) and log["loss"] > 0 and log["grad_norm"] > 0
    assert any(not torch.equal(before[n], p) for n, p in trainer.model.named_parameters())
    wanted = {
        "loss",
        "grad_norm",
        "learning_rate",
        "num_tokens",
        "completions/mean_length",
        "completions/clipped_ratio",
        "align/coverage",
        "align/one_to_one",
        "align/dropped",
    }
    assert wanted <= log.keys()
    assert 0 < log["align/coverage"] <= 1 and log["num_tokens"] > 0


def test_lowers_the_divergence_it_is_given(tmp_path: Path) -> None:
    """Sixty steps on four prompts bring the student closer to the teacher on fresh samples."""
    trainer = tiny.gkd(
        tmp_path,
        zoo.chatml(),
        zoo.nfc(),
        tiny.PROMPT_ROWS[:4],
        lmbda=1.0,
        beta=1.0,
        max_steps=60,
        learning_rate=1e-2,
        max_completion_length=16,
        min_coverage=0.0,  # bytes of a random student may hold no character
    )
    trainer.eval_dataset = Dataset.from_list(tiny.PROMPT_ROWS * 24)
    before = trainer.evaluate()["eval_reverse_kl_nats_per_byte"]
    trainer.train()
    assert trainer.evaluate()["eval_reverse_kl_nats_per_byte"] < 0.7 * before


def test_the_student_keeps_the_ids_it_sampled(tmp_path: Path) -> None:
    """From generation to loss: what the batch holds is what the sampler gave, though re-encoding would give other
    ids."""
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), lmbda=1.0)
    seen: list[np.ndarray] = []
    original = trainer.sample

    def spy(*args: Any) -> Any:
        seen.extend(original(*args))
        return seen

    trainer.sample = spy  # type: ignore[method-assign]
    (batch,) = window(trainer, CHAT[:4])
    for pair, ids in zip(batch.pairs, seen, strict=True):
        assert pair.student.ids[pair.student.prompt_length :].tolist() == ids.tolist()
    vocabulary = trainer.student_renderer.vocabulary
    encode = trainer.student_renderer.encoder.encode
    again = [encode([vocabulary.bytes_of(ids).decode("utf-8", "ignore")])[0].ids.tolist() for ids in seen]
    assert any(ids.tolist() != other for ids, other in zip(seen, again, strict=True)), (
        "a random model re-encodes alike?"
    )


# ---- the same-vocabulary limit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_equals_the_textbook_jsd_on_equal_vocabularies(tmp_path: Path, beta: float) -> None:
    """Loss and gradient are those of GKD's formula on whole logits, written naively in float64."""
    tokenizer = zoo.chatml()
    student, teacher = tiny.tiny_model(tokenizer, 0).double(), tiny.tiny_model(tokenizer, 1).double()
    trainer = tiny.gkd(tmp_path, tokenizer, tokenizer, models=(student, teacher), lmbda=0.0, beta=beta)
    assert trainer.comparisons[0].reader.same_vocabulary
    batches = window(trainer, CHAT)
    loss, gradient = gradients(trainer, batches)

    student.zero_grad()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        side = batch.student
        with torch.no_grad():
            q = teacher(
                batch.views[0].read.teacher.input_ids, attention_mask=batch.views[0].read.teacher.attention_mask
            ).logits.log_softmax(-1)
        p = student(side.input_ids, attention_mask=side.attention_mask).logits.log_softmax(-1)
        p, q = p.flatten(0, 1)[side.rows], q.flatten(0, 1)[batch.views[0].read.teacher.rows]
        if beta == 0:
            rows = (q.exp() * (q - p)).sum(-1)
        elif beta == 1:
            rows = (p.exp() * (p - q)).sum(-1)
        else:
            m = (beta * q.exp() + (1 - beta) * p.exp()).log()
            rows = beta * (q.exp() * (q - m)).sum(-1) + (1 - beta) * (p.exp() * (p - m)).sum(-1)
        total, count = total + rows.sum(), count + len(rows)
    (total / count).backward()
    expected = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    assert loss == pytest.approx((total / count).item(), abs=1e-9)
    assert close(gradient, expected, 1e-9)


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_the_general_path_equals_the_same_vocabulary_path(tmp_path: Path, lmbda: float) -> None:
    """Forced through re-encoding and byte alignment, equal tokenizers give the same loss and gradient to 1e-6.

    On canonical ids: off-policy text, and on-policy samples that re-encode to themselves.
    """
    tokenizer = zoo.chatml()
    results = []
    for path in ("auto", "general"):
        trainer = tiny.gkd(
            tmp_path,
            tokenizer,
            tokenizer,
            lmbda=lmbda,
            beta=0.5,
            vocabulary_path=path,
            objective="jsd",
        )
        canonical = trainer.student_renderer.encoder.encode(["hello there, one two"])[0].ids
        trainer.sample = lambda conversations, prompts, seeds, ids=canonical: [ids for _ in prompts]  # type: ignore[method-assign]
        results.append(gradients(trainer, window(trainer, CHAT)))
        assert trainer.comparisons[0].reader.same_vocabulary == (path == "auto")
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    assert close(results[0][1], results[1][1])


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_w41_embedding_padding_is_not_another_vocabulary(tmp_path: Path, side: str) -> None:
    """Equal tables with embeddings of unequal size train on the same-vocabulary path, on either side."""
    tokenizer = zoo.chatml()
    models = (
        tiny.tiny_model(tokenizer, 0, padding_rows=7 if side == "student" else 0),
        tiny.tiny_model(tokenizer, 1, padding_rows=7 if side == "teacher" else 0),
    )
    trainer = tiny.gkd(tmp_path, tokenizer, tokenizer, models=models)
    assert trainer.comparisons[0].reader.same_vocabulary
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_w8_equal_sizes_do_not_make_equal_vocabularies(tmp_path: Path) -> None:
    """Two embeddings of one size with other tables take the general path."""
    rows = max(len(zoo.chatml()), len(zoo.inst()))
    models = tuple(tiny.tiny_model(t, i, padding_rows=rows - len(t)) for i, t in enumerate((zoo.chatml(), zoo.inst())))
    assert models[0].config.vocab_size == models[1].config.vocab_size
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), models=models)
    assert not trainer.comparisons[0].reader.same_vocabulary
    assert [t.name for t in trainer.comparisons[0].terms] == ["covering"]


def test_jsd_on_unequal_vocabularies_is_refused_with_what_would_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="strict"):
        tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), objective="jsd")


# ---- what the loss is averaged over ----------------------------------------------------------------------------------


def test_w5_w6_w7_loss_and_gradient_do_not_depend_on_the_accumulation_split(tmp_path: Path) -> None:
    """One window as 1 x 8, 2 x 4, 4 x 2 and 8 x 1: the same number and the same gradient."""
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), lmbda=0.0)
    results = [gradients(trainer, window(trainer, CHAT, size)) for size in (8, 4, 2, 1)]
    for loss, result in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert close(result, results[0][1], 1e-5)


def test_w7_w42_the_count_is_of_what_was_written(tmp_path: Path) -> None:
    """On-policy, the denominator counts the rows of the student's completions, not of the dataset's."""
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), lmbda=1.0, objective="strict")
    batches = window(trainer, CHAT)
    assert batches[0].views[0].counts
    assert batches[0].views[0].counts["strict"] == sum(len(b.views[0].read.alignment.pair_s) for b in batches)
    assert all(b.on_policy for b in batches)


def test_the_logged_loss_is_the_windows_mean(tmp_path: Path) -> None:
    """Through the real training loop with two accumulation steps: what is logged is nats per row."""
    logged = []
    for batch, steps in ((8, 1), (4, 2), (2, 4)):
        trainer = tiny.gkd(
            tmp_path,
            zoo.chatml(),
            zoo.inst(),
            lmbda=0.0,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            max_steps=1,
        )
        trainer.train()
        logged.append((trainer.state.log_history[0]["loss"], trainer.state.log_history[0]["grad_norm"]))
    for loss, norm in logged[1:]:
        assert loss == pytest.approx(logged[0][0], rel=1e-4)
        assert norm == pytest.approx(logged[0][1], rel=1e-3)


def test_w43_the_draw_depends_on_seed_and_step_alone(tmp_path: Path) -> None:
    trainers = [tiny.gkd(tmp_path, zoo.chatml(), zoo.inst()) for _ in range(2)]
    torch.rand(3)  # whatever else has been drawn
    for step in range(5):
        for trainer in trainers:
            trainer.state.global_step = step
        assert trainers[0].draw("lmbda") == trainers[1].draw("lmbda")
    draws = []
    for step in range(200):
        trainers[0].state.global_step = step
        draws.append(trainers[0].draw("lmbda"))
    assert 0.3 < sum(d < 0.5 for d in draws) / 200 < 0.7


def test_w44_both_temperatures_act_where_they_belong(tmp_path: Path) -> None:
    """`kd_temperature` changes the divergence of given text; `temperature` does not."""
    losses = {}
    for options in ({}, {"kd_temperature": 2.0}, {"temperature": 2.0}):
        trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), lmbda=0.0, **options)
        losses[str(options)] = gradients(trainer, window(trainer, CHAT))[0]
    plain, warm, sampled = losses.values()
    assert plain == sampled and abs(warm - plain) > 1e-3
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), temperature=0.7)
    assert trainer.sampler.temperature == 0.7


# ---- empties, lengths, data ------------------------------------------------------------------------------------------


def _with_completions(trainer: GKDTrainer, completions: list[list[int]]) -> None:
    trainer.sample = lambda conversations, prompts, seeds: [np.array(c, dtype=np.int64) for c in completions]  # type: ignore


def test_w24_a_window_of_empty_completions_is_a_zero_step(tmp_path: Path) -> None:
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), lmbda=1.0)
    _with_completions(trainer, [[], [], [], []])
    loss, gradient = gradients(trainer, window(trainer, CHAT[:4]))
    assert loss == 0.0
    assert all(not g.any() for g in gradient.values())


def test_an_empty_completion_that_stopped_teaches_its_stop(tmp_path: Path) -> None:
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), lmbda=1.0)
    _with_completions(trainer, [[trainer.student_renderer.stop_id]] * 4)
    batches = window(trainer, CHAT[:4])
    assert batches[0].student.stop.tolist() == [True] * 4
    assert gradients(trainer, batches)[0] > 0


def test_w25_empty_completions_do_not_dilute_the_mean(tmp_path: Path) -> None:
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), lmbda=1.0)
    words = trainer.student_renderer.encoder.encode(["hello you two"])[0].ids.tolist()
    _with_completions(trainer, [words, words])
    full, _ = gradients(trainer, window(trainer, [CHAT[0], CHAT[0]]))
    _with_completions(trainer, [words, []])
    half, _ = gradients(trainer, window(trainer, [CHAT[0], CHAT[0]]))
    assert half == pytest.approx(full, rel=1e-5)


def test_w26_w29_a_completion_that_fills_the_limit_is_cut_at_its_end(tmp_path: Path) -> None:
    """The run goes on, the prompt stays whole, and no stop is scored on the cut text."""
    rows = [{"prompt": "Say it.", "completion": " word" * 200}] * 4
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), rows, lmbda=0.0, max_length=40)
    (batch,) = window(trainer, rows)
    assert batch.student.input_ids.shape[1] == 40
    assert not batch.student.stop.any()
    prompt = trainer.student_renderer.prompt_ids(batch.pairs[0].conversation)
    assert batch.student.input_ids[0, : len(prompt)].tolist() == prompt.tolist()
    trainer.train()


def test_a_prompt_that_does_not_fit_is_dropped_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "word " * 300}, *[{"prompt": "Say it."}] * 3]
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), rows, lmbda=1.0, max_length=60, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["align/dropped_samples"] == 1


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_w27_plain_text_rows_train(tmp_path: Path, lmbda: float) -> None:
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), tiny.TEXT_ROWS, lmbda=lmbda)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_w28_prompt_only_rows_train_on_policy(tmp_path: Path) -> None:
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), tiny.PROMPT_ROWS, lmbda=1.0)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_prompt_only_rows_off_policy_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="seq_kd"):
        tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), tiny.PROMPT_ROWS, lmbda=0.0)


def test_w33_seq_kd_trains_on_what_the_teacher_wrote(tmp_path: Path) -> None:
    """The teacher writes in its own ids; the student reads the same bytes in its own."""
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), tiny.PROMPT_ROWS, lmbda=0.0, seq_kd=True)
    text = "hello as you asked"
    ids = trainer.comparisons[0].teacher.renderer.encoder.encode([text])[0].ids
    called = []

    def written(model: Any, prompts: Any, **_: Any) -> Any:
        called.append(model is trainer.comparisons[0].teacher.model)
        return [np.append(ids, trainer.comparisons[0].teacher.renderer.stop_id) for _ in prompts]

    trainer.sampler_for = lambda renderer: written  # type: ignore
    (batch,) = window(trainer, tiny.PROMPT_ROWS[:4])
    assert called == [True]
    assert all(p.student.segment_bytes == (text.encode(),) for p in batch.pairs)
    assert batch.student.stop.sum() == 4
    real = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), tiny.PROMPT_ROWS, lmbda=0.0, seq_kd=True)
    real.train()
    assert math.isfinite(real.state.log_history[0]["loss"])


def test_w31_several_generations_of_one_prompt_are_all_scored(tmp_path: Path) -> None:
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), lmbda=1.0, num_generations=3)
    (batch,) = window(trainer, CHAT[:2])
    assert len(batch.pairs) == 6
    prompts = [p.student.ids[: p.student.prompt_length].tolist() for p in batch.pairs]
    assert prompts[0] == prompts[1] == prompts[2] != prompts[3]
    completions = {tuple(p.student.ids[p.student.prompt_length :]) for p in batch.pairs[:3]}
    assert len(completions) > 1


def test_w30_batches_are_as_wide_as_their_longest_sample(tmp_path: Path) -> None:
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), lmbda=1.0, max_completion_length=100)
    _with_completions(trainer, [[10, 11], [12], [13, 14, 15], []])
    (batch,) = window(trainer, CHAT[:4])
    assert batch.student.input_ids.shape[1] == max(len(p.student.ids) for p in batch.pairs)
    assert batch.views[0].read.teacher.input_ids.shape[1] == max(len(p.teacher.ids) for p in batch.pairs)


def test_w48_a_window_is_sampled_in_one_call(tmp_path: Path) -> None:
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), lmbda=1.0)
    calls: list[int] = []
    original = trainer.model.generate

    def spy(**options: Any) -> Any:
        calls.append(len(options["input_ids"]))
        return original(**options)

    trainer.model.generate = spy
    assert len(window(trainer, CHAT, 2)) == 4
    assert calls == [8]


def test_no_shared_token_at_all_is_an_error_that_says_so(tmp_path: Path) -> None:
    """W21: nothing in common means nothing to compare; not a crash inside an empty maximum."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={"<e>": 0, "жж": 1}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    other = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>", pad_token="<e>")
    trainer = tiny.gkd(tmp_path, zoo.chatml(), other, lmbda=0.0, min_coverage=0.3)
    with pytest.raises(AlignmentError, match="coverage"):
        trainer.train()


# ---- construction ----------------------------------------------------------------------------------------------------


def test_w45_the_teacher_is_loaded_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    tiny.save(folder, zoo.inst(), 1)
    args = GKDConfig(**tiny._common(tmp_path), teacher_model_name_or_path=str(folder))
    trainer = GKDTrainer(
        tiny.tiny_model(zoo.chatml()), args=args, train_dataset=Dataset.from_list(CHAT), processing_class=zoo.chatml()
    )
    assert len(trainer.comparisons[0].teacher.renderer.vocabulary) == len(zoo.inst())
    trainer.train()


def test_w45_no_teacher_is_an_error_that_names_the_argument(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="teacher_model_name_or_path"):
        GKDTrainer(
            tiny.tiny_model(zoo.chatml()), args=GKDConfig(**tiny._common(tmp_path)), processing_class=zoo.chatml()
        )


def test_w46_args_and_processing_class_may_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, tokenizer in (("s", zoo.chatml()), ("t", zoo.inst())):
        tiny.save(tmp_path / name, tokenizer)
    trainer = GKDTrainer(str(tmp_path / "s"), str(tmp_path / "t"), train_dataset=Dataset.from_list(CHAT))
    assert isinstance(trainer.args, GKDConfig)
    assert trainer.processing_class.eos_token == zoo.chatml().eos_token


def test_w47_init_kwargs_need_no_dtype(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    tiny.save(folder, zoo.inst())
    args = GKDConfig(
        **tiny._common(tmp_path),
        teacher_model_name_or_path=str(folder),
        teacher_model_init_kwargs={"attn_implementation": "eager"},
    )
    trainer = GKDTrainer(
        tiny.tiny_model(zoo.chatml()), args=args, train_dataset=Dataset.from_list(CHAT), processing_class=zoo.chatml()
    )
    assert trainer.comparisons[0].teacher.model.config._attn_implementation == "eager"


def test_s1_s10_a_bare_teacher_without_tokenizer_is_an_error_that_names_the_argument(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="teacher_tokenizer_name_or_path"):
        GKDTrainer(
            tiny.tiny_model(zoo.chatml()),
            tiny.tiny_model(zoo.inst()),
            GKDConfig(**tiny._common(tmp_path)),
            train_dataset=Dataset.from_list(CHAT),
            processing_class=zoo.chatml(),
        )


def test_s3_the_named_teacher_tokenizer_is_used(tmp_path: Path) -> None:
    zoo.inst().save_pretrained(tmp_path / "tokenizer")
    args = GKDConfig(**tiny._common(tmp_path), teacher_tokenizer_name_or_path=str(tmp_path / "tokenizer"))
    trainer = GKDTrainer(
        tiny.tiny_model(zoo.chatml()),
        tiny.tiny_model(zoo.inst()),
        args,
        train_dataset=Dataset.from_list(CHAT),
        processing_class=zoo.chatml(),
    )
    assert trainer.comparisons[0].teacher.renderer.tokenizer.eos_token == "</s>"


def test_a_teacher_smaller_than_its_tokenizer_is_an_error(tmp_path: Path) -> None:
    small = tiny.tiny_model(zoo.inst(), padding_rows=-20)
    with pytest.raises(VocabularyError, match=r"320 rows"):
        tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), models=(tiny.tiny_model(zoo.chatml()), small))


def test_options_that_cannot_work_are_refused(tmp_path: Path) -> None:
    for name, value in (("beta", 1.5), ("lmbda", -0.1), ("temperature", 0.0), ("score_turns", "some"), ("top_p", 0.0)):
        with pytest.raises(ConfigError, match=name):
            GKDConfig(output_dir=str(tmp_path), **{name: value})
    assert GKDConfig(output_dir=str(tmp_path), model_init_kwargs='{"a": 1}').model_init_kwargs == {"a": 1}
    for wrong in ("{", "[1]"):
        with pytest.raises(ConfigError, match="chat_template_kwargs"):
            GKDConfig(output_dir=str(tmp_path), chat_template_kwargs=wrong)
    with pytest.raises(ConfigError, match="max_length"):
        GKDConfig(output_dir=str(tmp_path), max_length=10, max_completion_length=20)


def test_several_weighted_objectives_add_up(tmp_path: Path) -> None:
    """The sum of terms, each with its own weight and its own count."""
    losses = {}
    for name, objective in {
        "strict": "strict",
        "kl": "sequence_kl",
        "both": [{"name": "strict", "weight": 2.0}, {"name": "sequence_kl", "weight": 0.5}],
    }.items():
        trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), lmbda=0.0, objective=objective)
        losses[name] = gradients(trainer, window(trainer, CHAT))[0]
    assert losses["both"] == pytest.approx(2 * losses["strict"] + 0.5 * losses["kl"], rel=1e-5)


def test_w39_no_cache_is_emptied_during_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(1))
    tiny.gkd(tmp_path, zoo.chatml(), zoo.inst()).train()
    assert not calls


def test_a_nonfinite_loss_never_reaches_the_optimizer(tmp_path: Path) -> None:
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), lmbda=0.0)
    with torch.no_grad():
        trainer.comparisons[0].teacher.model.lm_head.weight.fill_(float("nan"))
    before = tiny.parameters(trainer.model)
    with pytest.raises(FloatingPointError, match="step 0"):
        trainer.train()
    assert all(torch.equal(before[n], p) for n, p in trainer.model.named_parameters())


def test_lora_students_train_and_the_base_stays(tmp_path: Path) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), keywords={"peft_config": config}, lmbda=1.0)
    before = tiny.parameters(trainer.model)
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(before[n], p)}
    assert moved and all("lora_" in n for n in moved)


def test_the_saved_student_loads_without_diglot(tmp_path: Path) -> None:
    import subprocess
    import sys

    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst())
    trainer.save_model(str(tmp_path / "student"))
    code = (
        "import sys; from transformers import AutoModelForCausalLM as M; "
        f"m = M.from_pretrained({str(tmp_path / 'student')!r}); assert 'diglot' not in sys.modules; "
        "print(m.config.vocab_size)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": "", "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(zoo.chatml())


def test_evaluate_reports_tokenizer_free_metrics(tmp_path: Path) -> None:
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst())
    trainer.eval_dataset = Dataset.from_list(CHAT)
    report = trainer.evaluate()
    assert {"eval_loss", "eval_bits_per_byte", "eval_reverse_kl_nats_per_byte", "eval_coverage"} <= report.keys()
    assert all(math.isfinite(v) for v in report.values() if isinstance(v, float))


def test_model_card_names_teacher_student_and_data(tmp_path: Path) -> None:
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst())
    trainer.comparisons[0].teacher.model.config._name_or_path = "org/teacher"
    trainer.model.config._name_or_path = "org/student"
    trainer.create_model_card(dataset="org/data")
    card = (tmp_path / "README.md").read_text()
    assert "base_model: org/student" in card and "org/teacher" in card and "- org/data" in card and "2306.13649" in card


def test_log_completions_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), log_completions=True, log_completions_steps=1, max_steps=1).train()
    assert "Completions, step 0" in capsys.readouterr().out


def test_log_history_is_json(tmp_path: Path) -> None:
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst())
    trainer.train()
    assert json.loads(json.dumps(trainer.state.log_history))
