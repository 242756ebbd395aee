"""What the teacher reads for texts that somebody else wrote: its own template, its own tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from diglot.batches import PackedSide, pack
from diglot.errors import DataError
from diglot.rendering import Conversation, Rendered, Renderer, truncate

Prompt = str | Sequence[Mapping[str, Any]] | Conversation


@dataclass(frozen=True)
class TeacherInputs:
    """A batch for the teacher, padded on the right, [B, T]."""

    rendered: list[Rendered]
    input_ids: Tensor  # int64
    attention_mask: Tensor  # int64
    labels: Tensor  # int64, -100 outside the completion and its stop token
    prompt_lengths: Tensor  # int64 [B], tokens before the completion
    packed: PackedSide


def build_teacher_inputs_from_texts(
    tokenizer: PreTrainedTokenizerBase | Renderer,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    *,
    completed: Sequence[bool] | None = None,
    thinking: Sequence[bool | None] | None = None,
    max_length: int | None = None,
) -> TeacherInputs:
    """Prompts and completions as a teacher reads them, in its own chat template and tokens.

    Args:
        tokenizer: the teacher's tokenizer, or a `Renderer` made of it.
        prompts: plain text, messages, or conversations.
        completions: the texts to be scored.
        completed: which completions ended by themselves; the others get no stop token. All by default.
        thinking: for each prompt, whether the completion starts inside a think block; None: as the teacher's
            template has it.
        max_length: tokens beyond are cut at the end.

    Raises:
        DataError: unequal numbers of prompts and completions, or a prompt that leaves no room within `max_length`.
    """
    if len(prompts) != len(completions):
        raise DataError(
            f"{len(prompts)} prompts and {len(completions)} completions: give one completion for each prompt."
        )
    renderer = tokenizer if isinstance(tokenizer, Renderer) else Renderer(tokenizer, name="teacher")
    ended = completed if completed is not None else [True] * len(completions)
    inside = thinking if thinking is not None else [None] * len(completions)
    rendered = [
        renderer.render(as_conversation(p), text, stopped=stop, thinking=think)
        for p, text, stop, think in zip(prompts, completions, ended, inside, strict=True)
    ]
    if max_length is not None:
        rendered = [truncate(r, max_length) for r in rendered]
    packed = pack(rendered, [1] * len(rendered), renderer.stop_id)
    labels = torch.full_like(packed.input_ids, -100)
    labels.view(-1)[packed.rows + 1] = packed.targets
    lengths = [int((r.roles != 0).argmax()) if (r.roles != 0).any() else len(r.ids) for r in rendered]
    return TeacherInputs(
        rendered,
        packed.input_ids,
        packed.attention_mask,
        labels,
        torch.from_numpy(np.array(lengths, dtype=np.int64)),
        packed,
    )


def as_conversation(prompt: Prompt) -> Conversation:
    """A prompt of any of the three kinds."""
    if isinstance(prompt, Conversation):
        return prompt
    if isinstance(prompt, str):
        return Conversation(None, prompt)
    return Conversation(tuple(dict(m) for m in prompt))
