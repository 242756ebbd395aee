"""Models that read pictures, used with text: by name, as a whole, in both roles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import support.tokenizers_zoo as zoo
import torch
from safetensors.torch import load_file
from support import tiny
from transformers import (
    CLIPVisionConfig,
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from diglot.cli.main import main
from diglot.heads.hidden import last_hidden
from diglot.teachers.loading import load_language_model

SMALL = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8
)


def llava() -> LlavaForConditionalGeneration:
    tokenizer = zoo.chatml()
    text = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, max_position_embeddings=512, **SMALL)
    eyes = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    torch.manual_seed(0)
    config = LlavaConfig(text_config=text, vision_config=eyes, image_token_index=5)
    config.eos_token_id = tokenizer.eos_token_id
    return LlavaForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pictures")
    llava().save_pretrained(root / "llava")
    zoo.chatml().save_pretrained(root / "llava")
    (root / "llava" / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    tiny.tiny_model(zoo.inst(), 1).save_pretrained(root / "text")
    zoo.inst().save_pretrained(root / "text")
    (root / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.CHAT_ROWS), encoding="utf-8")
    return {path.name: path for path in root.iterdir()}


def test_a_model_with_eyes_is_loaded_as_a_whole_and_gives_its_own_logits(folders: dict[str, Path]) -> None:
    model = load_language_model(str(folders["llava"]), use_safetensors=True)
    assert type(model) is LlavaForConditionalGeneration
    ids = torch.arange(6, 14)[None]
    assert torch.equal(model(input_ids=ids).logits, llava()(input_ids=ids).logits)
    assert type(load_language_model(str(folders["text"]), use_safetensors=True)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_with_eyes_trains_and_teaches_by_name(role: str, folders: dict[str, Path], tmp_path: Path) -> None:
    student, teacher = ("llava", "text") if role == "student" else ("text", "llava")
    out = tmp_path / "out"
    code = main([
        "train", "--model_name_or_path", str(folders[student]), "--teacher_model_name_or_path", str(folders[teacher]),
        "--dataset_name", str(folders["chat.jsonl"]), "--output_dir", str(out), "--max_steps", "1", "--use_cpu", "true",
        "--max_completion_length", "4", "--lmbda", "0", "--disable_tqdm", "true", "--save_strategy", "no",
    ])  # fmt: skip
    assert code == 0
    if role == "student":
        before, after = load_file(folders["llava"] / "model.safetensors"), load_file(out / "model.safetensors")
        eyes = [name for name in before if "vision" in name]
        assert before.keys() == after.keys() and eyes and all(torch.equal(before[n], after[n]) for n in eyes)
        assert (out / "preprocessor_config.json").exists()
    else:
        assert not (out / "preprocessor_config.json").exists()


@pytest.mark.parametrize("pictures", [True, False])
def test_a_decoder_that_is_a_language_model_itself_gives_hidden_states(pictures: bool) -> None:
    """Llama 4, with and without pictures: its decoder has a head of its own."""
    eyes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    eyes |= dict(patch_size=14, vision_output_dim=16, projector_input_dim=16, projector_output_dim=16)
    text = dict(vocab_size=64, intermediate_size_mlp=48, num_local_experts=2, max_position_embeddings=64, **SMALL)
    config = Llama4Config(text_config={**text, "layer_types": None, "no_rope_layers": None}, vision_config=eyes)
    torch.manual_seed(0)
    model = (Llama4ForConditionalGeneration(config) if pictures else Llama4ForCausalLM(config.text_config)).eval()
    ids = torch.arange(8, 16)[None]
    with torch.no_grad():
        hidden = last_hidden(model, ids, torch.ones_like(ids))
        logits = model.get_output_embeddings()(hidden)
        assert torch.allclose(logits, model(input_ids=ids).logits, atol=1e-5)
