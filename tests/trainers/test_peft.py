"""LoRA students: trained, saved, loaded, merged and resumed; an adapter on the head; gradient checkpointing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
import torch
from peft import LoraConfig, PeftModel, prepare_model_for_kbit_training
from support import tiny
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from diglot.comparisons.build import keep_trainable
from diglot.errors import ConfigError
from diglot.heads import turn_off_dropout

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
MAKERS = pytest.mark.parametrize("make", [tiny.gkd, tiny.minillm], ids=["gkd", "minillm"])


def lora(**options: Any) -> dict[str, Any]:
    """Keywords of a trainer; every matrix gets an adapter unless `target_modules` says which."""
    options = {"target_modules": "all-linear", **options}
    return {"peft_config": LoraConfig(r=4, lora_alpha=32, task_type="CAUSAL_LM", **options)}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")  # the head is saved as a whole too
@MAKERS
@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "lm_head"]], ids=["layers", "head"])
def test_an_adapter_is_saved_loaded_and_merged(tmp_path: Path, make: Any, target: Any) -> None:
    """The saved adapter on a fresh base gives the trained logits to the bit; merged weights give them to rounding."""
    trainer = make(
        tmp_path, zoo.chatml(), zoo.inst(), learning_rate=1e-2, keywords=lora(target_modules=target), max_steps=2
    )
    trainer.train()
    trained = logits(trainer.model)
    trainer.save_model(str(tmp_path / "adapter"))
    base = tiny.tiny_model(zoo.chatml(), 0)
    assert (logits(base) - trained).abs().max() > 1e-3  # the adapter does something
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(loaded), trained)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), trained, rtol=1e-5, atol=1e-5)


@MAKERS
def test_a_lora_run_is_resumed_exactly(tmp_path: Path, make: Any) -> None:
    options: dict[str, Any] = dict(max_steps=3, save_strategy="steps", save_steps=1, keywords=lora())
    through = make(tmp_path / "a", zoo.chatml(), zoo.inst(), **options)
    through.train()
    options["keywords"] = lora()
    resumed = make(tmp_path / "b", zoo.chatml(), zoo.inst(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    for (name, p), q in zip(through.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.fixture
def four_bits(tmp_path: Path) -> Any:
    """The student's weights, loaded in four bits: the same every time."""
    tiny.tiny_model(zoo.chatml(), 0, hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    return lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization)


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit:UserWarning")
@MAKERS
def test_a_student_in_four_bits_is_trained_saved_loaded_merged_and_resumed(
    tmp_path: Path, make: Any, four_bits: Any
) -> None:
    """QLoRA: the adapter goes through everything that one on whole weights does."""
    teacher = tiny.tiny_model(zoo.inst(), 1)
    options: dict[str, Any] = dict(max_steps=2, save_strategy="steps", save_steps=1, learning_rate=1e-2)
    if make is tiny.gkd:
        options |= {"objective": "strict", "beta": 0.5}  # moves it further in two steps than four bits round

    def made(out: str) -> Any:
        model = prepare_model_for_kbit_training(four_bits(), use_gradient_checkpointing=False)
        keywords = lora(target_modules=["q_proj", "v_proj", "down_proj"])
        return make(tmp_path / out, zoo.chatml(), zoo.inst(), models=(model, teacher), keywords=keywords, **options)

    through, resumed = made("a"), made("b")
    through.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    for (name, p), q in zip(through.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    trained = logits(through.model)
    through.save_model(str(tmp_path / "adapter"))
    keep_trainable(base := four_bits())  # the same kernels
    before = logits(base)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(loaded), trained)
    assert (before - trained).abs().max() > 1e-3
    merged = logits(loaded.merge_and_unload())  # back into four bits, which rounds
    assert (merged - trained).abs().max() < (before - trained).abs().max()


def test_an_adapter_on_the_head_is_part_of_the_loss(tmp_path: Path) -> None:
    """The head that the loss reads is the adapted one, before and after its adapter has moved."""
    trainer = tiny.gkd(
        tmp_path, zoo.chatml(), zoo.inst(), learning_rate=1e-2, lmbda=0.0, keywords=lora(target_modules=["lm_head"])
    )
    start = tiny.parameters(trainer.model)
    trainer.train()
    moved = [n for n, p in trainer.model.named_parameters() if not torch.equal(p, start[n])]
    assert moved and all("lm_head.lora_" in name for name in moved)
    trainer.student_head.verify(trainer.student)


@pytest.mark.parametrize("keywords", [{}, "lora"], ids=["full", "lora"])
def test_gradient_checkpointing_changes_neither_loss_nor_gradient(tmp_path: Path, keywords: Any) -> None:
    results = []
    for on in (False, True):
        trainer = tiny.gkd(
            tmp_path,
            zoo.chatml(),
            zoo.inst(),
            lmbda=0.0,
            gradient_checkpointing=on,
            max_steps=1,
            keywords=lora() if keywords else {},
        )
        torch.manual_seed(0)
        trainer.train()
        # AdamW's first moment after one step is a tenth of the clipped gradient.
        state = trainer.optimizer.state_dict()["state"]
        results.append((trainer.state.log_history[0]["loss"], [s["exp_avg"] for s in state.values()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
    assert any(moment.abs().max() > 0 for moment in results[0][1])


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
def test_learned_prompts_are_refused_since_their_positions_would_shift_the_rows(tmp_path: Path, kind: str) -> None:
    import peft

    options = {"encoder_hidden_size": 8} if kind == "PromptEncoderConfig" else {}
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=2, **options)
    with pytest.raises(ConfigError, match=r"adapter is P\w+, which puts learned positions.*LoRA"):
        tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), keywords={"peft_config": config})


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"attention_dropout": 0.4}),
        ("opt", {"dropout": 0.4, "attention_dropout": 0.4, "word_embed_proj_dim": 32, "ffn_dim": 48}),
        ("bloom", {"hidden_dropout": 0.4, "attention_dropout": 0.4}),
        ("gpt2", {"resid_pdrop": 0.4, "attn_pdrop": 0.4, "embd_pdrop": 0.4}),
    ],
)
def test_dropout_is_off_also_where_a_module_hands_it_to_a_function(family: str, options: dict[str, Any]) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    config = AutoConfig.for_model(family, **sizes, **options)
    config.pad_token_id = None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    assert not torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)
    turn_off_dropout(model)
    assert torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)
