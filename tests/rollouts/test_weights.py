"""The student's weights as a checkpoint for another process."""

from __future__ import annotations

from pathlib import Path

import pytest
import support.tokenizers_zoo as zoo
import torch
from peft import LoraConfig, get_peft_model
from support import tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

from diglot.rollouts.weights import WeightsFolder

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def reread(place: Path, model: PreTrainedModel, whole_head: bool = False) -> PreTrainedModel:
    with WeightsFolder(place).holding(model, whole_head) as folder:
        return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("keeps", [None, ["lm_head"]])
def test_adapters_are_merged_into_the_checkpoint_and_not_into_the_student(
    tmp_path: Path, keeps: list[str] | None
) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=keeps, init_lora_weights=False)
    start = tiny.tiny_model(zoo.chatml())
    plain = logits(start)
    model = get_peft_model(start, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name:
                p.add_(0.1)
    before, written = tiny.parameters(model), logits(model)
    assert (written - plain).abs().max() > 0.1
    torch.testing.assert_close(logits(reread(tmp_path, model)), written, atol=1e-4, rtol=0)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_a_tied_head_is_written_under_its_own_name_on_request(tmp_path: Path) -> None:
    model = tiny.tiny_model(zoo.chatml(), tie_word_embeddings=True)
    result = reread(tmp_path, model, whole_head=True)
    assert not result.config.tie_word_embeddings and model.config.tie_word_embeddings
    assert result.get_output_embeddings().weight is not result.get_input_embeddings().weight
    torch.testing.assert_close(logits(result), logits(model))
    assert reread(tmp_path, model).config.tie_word_embeddings


def test_nothing_is_left_behind_not_even_by_a_run_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "step-7").mkdir()
    (tmp_path / "mine.txt").write_text("kept")
    reread(tmp_path, tiny.tiny_model(zoo.chatml()))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
