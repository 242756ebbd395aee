"""A tree of branches off a text gives what reading every prefix and branch as a text of its own gives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from diglot.heads import Branches, TreeReading, last_hidden
from diglot.heads import branches as module

SIZES = dict(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, eos_token_id=0, bos_token_id=None,
)  # fmt: skip
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
ROWS = torch.tensor([1, 2, 3, 4, 5, 7, 8, 9])
BRANCHES = Branches(
    ids=np.array([20, 21, 22, 23, 24, 25, 26]),
    after=np.array([2, 2, 2, 4, 7, 7, 9]),
    depth=np.array([0, 1, 2, 0, 0, 1, 0]),
)


def models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    return {
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES)).eval(),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval(),
        "gemma3": Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=32)).eval(),
        "gemma3 with a short window": Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4)).eval(),
    }


def alone(model: torch.nn.Module, branches: Branches = BRANCHES) -> torch.Tensor:
    """Each branch token behind its own prefix, one text at a time."""
    states = []
    for e in range(len(branches)):
        first = e - int(branches.depth[e])
        row, place = divmod(int(branches.after[e]), IDS.shape[1])
        text = [*IDS[row, : place + 1].tolist(), *branches.ids[first : e + 1].tolist()]
        states.append(last_hidden(model, torch.tensor([text]), torch.ones(1, len(text), dtype=torch.long))[0, -1])
    return torch.stack(states)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "gemma3 with a short window"])
def test_branches_are_read_as_texts_of_their_own(name: str) -> None:
    model = models()[name]
    with torch.no_grad():
        main, branches = TreeReading(model, IDS, MASK, ROWS).first(BRANCHES)
        plain = last_hidden(model, IDS, MASK).flatten(0, 1)[ROWS]
        torch.testing.assert_close(main, plain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(branches, alone(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "gemma3 with a short window"])
def test_a_reading_is_gone_on_with(name: str) -> None:
    """Later branches see the text, and nothing of earlier ones, whatever the model kept of them."""
    model, later = models()[name], Branches(np.array([30, 31, 32]), np.array([3, 3, 6]), np.array([0, 1, 0]))
    with torch.no_grad():
        reading = TreeReading(model, IDS, MASK, ROWS)
        reading.first(BRANCHES)
        for branches in (later, BRANCHES, later):
            torch.testing.assert_close(reading.more(branches), alone(model, branches), rtol=1e-4, atol=1e-5)


LIMITED: dict[str, Callable[[], PreTrainedConfig]] = {
    "longrope": lambda: Phi3Config(
        **SIZES, original_max_position_embeddings=12, initializer_range=0.5,
        rope_parameters=dict(
            rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0, 5.0, 6.0, 7.0],
            original_max_position_embeddings=12, factor=8.0,
        ),
    ),
    "dynamic": lambda: LlamaConfig(
        **{**SIZES, "max_position_embeddings": 12}, initializer_range=0.5,
        rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=4.0),
    ),
    "chunks": lambda: Llama4TextConfig(
        **SIZES, head_dim=8, initializer_range=0.5, attention_chunk_size=12, num_local_experts=2,
        intermediate_size_mlp=24, no_rope_layers=[1, 1],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIMITED)
@pytest.mark.parametrize("length", [10, 20])
def test_a_length_that_changes_positions_or_what_is_seen_changes_no_branch(name: str, length: int) -> None:
    """Models whose pass is another one for texts of more than 12 tokens, more than are tried at the start."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LIMITED[name]()).eval()
    ids = torch.randint(2, 40, (2, length))
    branches = Branches(np.array([5, 6, 7]), np.array([4, 4, 2 * length - 2]), np.array([0, 1, 0]))
    with torch.no_grad():
        reading = TreeReading(model, ids, torch.ones_like(ids), torch.arange(2 * length))
        behind, alone = reading.first(branches)[1], module._one_by_one(model, ids, branches)
    assert reading._trees == (length == 10)
    torch.testing.assert_close(behind, alone, rtol=1e-4, atol=1e-4)


def test_what_comes_later_costs_its_own_tokens() -> None:
    model, seen = models()["llama"], list[int]()
    reading = TreeReading(model, IDS, MASK, ROWS)
    with torch.no_grad():
        reading.first(BRANCHES)
        model.register_forward_hook(
            lambda module, args, kwargs, output: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        reading.more(Branches(np.array([30, 31, 32]), np.array([3, 3, 6]), np.array([0, 1, 0])))
    assert seen == [2 * 2]  # two tokens behind the first row


def test_a_model_that_takes_no_such_mask_reads_each_prefix_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models()["llama"]
    monkeypatch.setattr(module, "_takes_trees", lambda model: False)
    with torch.no_grad():
        _, branches = TreeReading(model, IDS, MASK, ROWS).first(BRANCHES)
        torch.testing.assert_close(branches, alone(model), rtol=1e-4, atol=1e-5)


def test_branches_cost_their_own_tokens_however_they_are_spread_over_the_texts() -> None:
    """Padded to the text with the most branches, they cost twice their tokens."""
    model, seen = models()["llama"], list[int]()
    model.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    uneven = Branches(np.arange(20, 30), np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 7]), np.array([0, 1] * 4 + [0, 0]))
    with torch.no_grad():
        TreeReading(model, IDS, MASK, ROWS).first(uneven)
        seen.clear()
        _, branches = TreeReading(model, IDS, MASK, ROWS).first(uneven)
        text, behind = seen
        torch.testing.assert_close(branches, alone(model, uneven), rtol=1e-4, atol=1e-5)
    assert text == IDS.numel() and behind <= 12


def test_many_branches_of_a_long_text_are_read_in_passes_of_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask over all of them at once grows with their square: two gigabytes for a text of thirty thousand tokens."""
    monkeypatch.setattr(module, "_MASK", 48)  # 8 tokens of branches beside a text of 6
    monkeypatch.setattr(module, "_LONGEST", 4)
    model, seen = models()["llama"], list[tuple[int, ...]]()
    depth = np.array([0, 1, 0, 0, 1, 2, 0, 1] * 4)
    after = np.array([0, 0, 2, 3, 3, 3, 8, 8] * 4)
    many = Branches(np.arange(32) % 40, after, depth)
    model.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    with torch.no_grad():
        TreeReading(model, IDS, MASK, ROWS).first(many)
        seen.clear()
        _, branches = TreeReading(model, IDS, MASK, ROWS).first(many)
        passes = seen[1:]
        torch.testing.assert_close(branches, alone(model, many), rtol=1e-4, atol=1e-5)
    assert len(passes) == 4 and all(rows * columns <= 12 and columns <= 4 for rows, columns in passes)


def test_ten_thousand_branches_of_one_text_are_packed_without_gaps() -> None:
    """Each row was tried for each branch: twelve seconds for these."""
    length = np.array([1, 3, 1, 2, 5] * 2000)
    row, column = module._packed(np.zeros(length.sum(), dtype=int), np.repeat(np.arange(10000), length), 30000)
    assert (row.max() + 1) * (column.max() + 1) <= 1.1 * length.sum()
    assert len(np.unique(row * (column.max() + 1) + column)) == length.sum() and column.max() < module._LONGEST


def test_a_batch_without_branches_is_the_plain_pass() -> None:
    model, none = models()["llama"], np.zeros(0, dtype=np.int64)
    with torch.no_grad():
        main, branches = TreeReading(model, IDS, MASK, ROWS).first(Branches(none, none, none))
        torch.testing.assert_close(main, last_hidden(model, IDS, MASK).flatten(0, 1)[ROWS])
    assert branches.shape == (0, 16)


def with_rounding(size: float) -> torch.nn.Module:
    """A model one of whose channels is five hundred times as large as the others, and whose passes differ a little."""
    model = models()["llama"]
    model.model.norm.weight.data[3] = 500.0
    noise = torch.Generator().manual_seed(0)

    def rounded(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output * (1 + size * torch.randn(output.shape, generator=noise))

    model.model.norm.register_forward_hook(rounded)
    return model


def test_rounding_that_differs_from_pass_to_pass_is_no_reason_to_read_every_prefix_again() -> None:
    """Real models with large channels fell to ten times the cost with another number of threads."""
    assert module._takes_trees(with_rounding(1e-5))


def test_a_model_whose_trees_give_other_states_reads_every_prefix_again_and_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blind(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, **options: object) -> torch.Tensor:
        return last_hidden(model, ids, torch.ones_like(mask) if mask.ndim == 4 else mask, **options)

    monkeypatch.setattr(module, "last_hidden", blind)
    model = models()["llama"]
    assert not module._takes_trees(model) and not module._takes_trees(model)
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "LlamaForCausalLM" in caplog.text
