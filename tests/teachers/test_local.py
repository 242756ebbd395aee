"""Local teachers: quantised, out of a GGUF file, the student's own base, and with a prompt of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support.tokenizers_zoo as zoo
import torch
from datasets import Dataset
from peft import LoraConfig
from support import tiny
from support.gguf_file import write_gguf
from torch import Tensor
from transformers import AutoModelForCausalLM

from diglot.batches import AlignedBatch
from diglot.data import to_sample
from diglot.errors import ConfigError, DataError, TeacherError
from diglot.rendering import Conversation
from diglot.teachers import LocalTeacher, build_teacher_inputs_from_texts
from diglot.teachers.adapter import AdapterOff
from diglot.teachers.loading import keeps_its_device, load_teacher_model
from diglot.trainers import GKDConfig, GKDTrainer, MiniLLMConfig, MiniLLMTrainer

CHAT = tiny.CHAT_ROWS


def window(trainer: Any, rows: list[dict[str, Any]]) -> AlignedBatch:
    batch = trainer.data_collator(rows)
    return trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)[0][0]["batch"].views[0].read


def options(out: Path, **more: Any) -> dict[str, Any]:
    return dict(
        output_dir=str(out), use_cpu=True, max_steps=2, per_device_train_batch_size=4, max_completion_length=8,
        save_strategy="no", disable_tqdm=True, logging_steps=1, max_length=256, **more,
    )  # fmt: skip


# ---- the student's base ----------------------------------------------------------------------------------------------


LORA = dict(r=4, lora_alpha=8, task_type="CAUSAL_LM", init_lora_weights=False)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
@pytest.mark.parametrize("kind", ["gkd", "minillm"])
def test_the_base_with_the_adapter_off_gives_the_bases_scores_to_the_bit(
    tmp_path: Path, kind: str, targets: list[str]
) -> None:
    """Before and after training; the student itself has moved away."""
    student = tiny.tiny_model(zoo.chatml(), 0, tie_word_embeddings=False)
    base = tiny.tiny_model(zoo.chatml(), 0, tie_word_embeddings=False)
    config, trainer_class = (GKDConfig, GKDTrainer) if kind == "gkd" else (MiniLLMConfig, MiniLLMTrainer)
    trainer: Any = trainer_class(
        student,
        "self",
        config(**options(tmp_path, learning_rate=0.01, **({"lmbda": 1.0} if kind == "gkd" else {}))),
        train_dataset=Dataset.from_list(tiny.PROMPT_ROWS),
        processing_class=zoo.chatml(),
        peft_config=LoraConfig(target_modules=targets, **LORA),
    )
    assert isinstance(trainer.comparisons[0].teacher, AdapterOff) and trainer.comparisons[0].reader.same_vocabulary
    alone = LocalTeacher(base, trainer.comparisons[0].teacher.renderer)
    for _ in range(2):
        batch = window(trainer, tiny.PROMPT_ROWS[:4])
        trainer.model.train()
        states = trainer.comparisons[0].teacher.hidden(batch.teacher)
        with torch.no_grad():
            logits = base(batch.teacher.input_ids, batch.teacher.attention_mask).logits
            expected = alone.head(alone.hidden(batch.teacher))
            assert torch.equal(trainer.comparisons[0].teacher.head(states), expected)
            assert torch.allclose(expected, logits.flatten(0, 1)[batch.teacher.rows], atol=1e-5)
            own = trainer.student_head(trainer.hidden_at_rows(trainer.model, batch.student))
        assert not torch.equal(own, expected)
        assert trainer.model.training and all(
            p.requires_grad for n, p in trainer.model.named_parameters() if "lora" in n
        )
        trainer.train()


def test_a_student_without_an_adapter_is_no_teacher_of_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="adapter"):
        GKDTrainer(
            tiny.tiny_model(zoo.chatml()),
            "self",
            GKDConfig(**options(tmp_path)),
            train_dataset=Dataset.from_list(CHAT),
            processing_class=zoo.chatml(),
        )


# ---- a prompt of its own ---------------------------------------------------------------------------------------------

SECRET: list[dict[str, Any]] = [
    {**row, "teacher_prompt": [{"role": "user", "content": f"The answer is {i}. {row['messages'][0]['content']}"}]}
    for i, row in enumerate(CHAT)
]


def teacher_scores(trainer: Any, batch: AlignedBatch) -> Tensor:
    """Log-probs of the written tokens."""
    rows = trainer.comparisons[0].teacher.head(trainer.comparisons[0].teacher.hidden(batch.teacher)).log_softmax(-1)
    return rows.gather(-1, batch.teacher.targets[:, None])[:, 0]


def plain_scores(trainer: Any, prompts: list[Conversation], replies: list[str], stopped: list[bool]) -> Tensor:
    """The same for these conversations, as anybody would score them."""
    inputs = build_teacher_inputs_from_texts(
        trainer.comparisons[0].teacher.renderer, prompts, replies, completed=stopped, thinking=[False] * len(prompts)
    )
    with torch.no_grad():
        logps = (
            trainer.comparisons[0].teacher.model(inputs.input_ids, inputs.attention_mask).logits.log_softmax(-1)[:, :-1]
        )
    labels = inputs.labels[:, 1:]
    return logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels >= 0]


@pytest.mark.parametrize("make", [tiny.gkd, tiny.minillm])
@pytest.mark.parametrize("teacher", ["chatml", "inst"])
def test_the_teacher_reads_its_own_prompt_before_the_same_bytes(tmp_path: Path, make: Any, teacher: str) -> None:
    extra = {"lmbda": 1.0} if make is tiny.gkd else {}
    trainer = make(tmp_path, zoo.chatml(), zoo.ALL[teacher](), SECRET, **extra)
    batch = window(trainer, SECRET[:4])
    assert batch.alignment.num_chunks > 0
    views = [to_sample(row, "row").conversation.teacher_view for row in SECRET[:4]]
    written = [p.teacher.segment_bytes[-1] for p in batch.pairs]
    assert written == [p.student.segment_bytes[-1] for p in batch.pairs]
    stopped = [p.teacher.stopped[-1] for p in batch.pairs]
    if teacher == "inst":  # with equal vocabularies the teacher reads the sampled ids, which need not be canonical
        replies = [text.decode() for text in written]
        expected = plain_scores(trainer, views, replies, stopped)  # type: ignore[arg-type]
        assert torch.allclose(teacher_scores(trainer, batch), expected, atol=1e-5)
    for pair, view, row in zip(batch.pairs, views, SECRET, strict=False):
        assert view is not None
        prompt = trainer.comparisons[0].teacher.renderer.prompt_ids(view, thinking=False)
        assert np.array_equal(pair.teacher.ids[: len(prompt)], prompt)
        own = trainer.student_renderer.prompt_ids(to_sample(row, "row").conversation)
        assert np.array_equal(pair.student.ids[: len(own)], own)
    trainer.train()


@pytest.mark.parametrize("make", [tiny.gkd, tiny.minillm])
def test_a_system_text_is_the_teachers_alone(tmp_path: Path, make: Any) -> None:
    extra = {"lmbda": 1.0} if make is tiny.gkd else {}
    trainer = make(tmp_path, zoo.chatml(), zoo.chatml(), CHAT, teacher_system_prompt="Be terse.", **extra)
    batch = window(trainer, CHAT[:2])
    for pair in batch.pairs:
        assert "Be terse." in trainer.comparisons[0].teacher.renderer.tokenizer.decode(pair.teacher.ids)
        assert "Be terse." not in trainer.student_renderer.tokenizer.decode(pair.student.ids)


def test_given_replies_are_scored_after_the_teachers_prompt(tmp_path: Path) -> None:
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), SECRET, lmbda=0.0)
    batch = window(trainer, SECRET[:4])
    samples = [to_sample(row, "row") for row in SECRET[:4]]
    expected = plain_scores(
        trainer,
        [s.conversation.teacher_view for s in samples],
        [str(s.reply) for s in samples],
        [True] * 4,  # type: ignore[misc]
    )
    assert torch.allclose(teacher_scores(trainer, batch), expected, atol=1e-5)
    plain = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), CHAT, lmbda=0.0)
    assert not torch.allclose(teacher_scores(plain, window(plain, CHAT[:4])), expected, atol=1e-2)


def test_a_prompt_of_its_own_and_all_turns_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="score_turns"):
        tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), SECRET, lmbda=0.0, score_turns="all")


# ---- weights of other kinds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_teachers_train_on_the_cpu(tmp_path: Path, bits: int) -> None:
    """bitsandbytes, through the arguments of `from_pretrained` as a YAML file gives them."""
    pytest.importorskip("bitsandbytes")
    whole = tiny.tiny_model(zoo.inst(), 1, hidden_size=64, intermediate_size=128)
    whole.save_pretrained(tmp_path / "teacher")
    zoo.inst().save_pretrained(tmp_path / "teacher")
    quantization = {"quant_method": "bitsandbytes", f"load_in_{bits}bit": True}
    trainer = GKDTrainer(
        tiny.tiny_model(zoo.chatml()),
        None,
        GKDConfig(
            **options(tmp_path / "run", lmbda=0.0),
            teacher_model_name_or_path=str(tmp_path / "teacher"),
            teacher_model_init_kwargs={"quantization_config": quantization, "dtype": "float32"},
        ),
        train_dataset=Dataset.from_list(CHAT),
        processing_class=zoo.chatml(),
    )
    model: Any = trainer.comparisons[0].teacher.model  # type: ignore[union-attr]
    assert keeps_its_device(model) and model.is_quantized
    batch = window(trainer, CHAT[:4])
    model_hidden = trainer.comparisons[0].teacher.hidden(batch.teacher)  # type: ignore[union-attr]
    probabilities = trainer.comparisons[0].teacher.head(model_hidden).softmax(-1)  # type: ignore[union-attr]
    with torch.no_grad():
        own = whole(batch.teacher.input_ids, batch.teacher.attention_mask).logits.flatten(0, 1)[batch.teacher.rows]
    distance = float((probabilities - own.softmax(-1)).abs().sum(-1).mean())
    assert 1e-4 < distance < (0.3 if bits == 8 else 1.5)
    trainer.train()
    assert np.isfinite(trainer.state.log_history[0]["loss"])


def test_a_method_that_is_not_installed_is_said(tmp_path: Path) -> None:
    tiny.tiny_model(zoo.inst()).save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match="cannot be loaded"):
        load_teacher_model(str(tmp_path), {"quantization_config": {"quant_method": "hqq"}})


def test_a_teacher_out_of_a_gguf_file_says_what_its_weights_say(tmp_path: Path) -> None:
    whole = tiny.tiny_model(zoo.inst(), 1, tie_word_embeddings=False)
    write_gguf(tmp_path / "tiny.gguf", whole, zoo.inst())
    loaded = load_teacher_model(str(tmp_path / "tiny.gguf"), {"dtype": "float32"})
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, whole(ids).logits, atol=1e-5)
        assert torch.equal(loaded(ids).logits, again(ids).logits)
    trainer = tiny.gkd(
        tmp_path / "run", zoo.chatml(), None, CHAT, lmbda=0.0,
        models=(tiny.tiny_model(zoo.chatml()), str(tmp_path / "tiny.gguf")),
        teacher_model_init_kwargs={"dtype": "float32"}, min_coverage=0.0,
    )  # fmt: skip
    assert trainer.comparisons[0].teacher.renderer.vocabulary.same_as(
        type(trainer.comparisons[0].teacher.renderer.vocabulary).from_tokenizer(zoo.inst())
    )
    trainer.train()
    assert np.isfinite(trainer.state.log_history[0]["loss"])
