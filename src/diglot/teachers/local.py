"""A teacher that is a model in this process: the highest level that is cheap, hidden states with their head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diglot.batches import PackedSide
from diglot.errors import TeacherError
from diglot.heads import Branches, Head, TreeReading, hidden_at_rows
from diglot.heads.shared_prompts import Host
from diglot.objectives.levels import Level
from diglot.rendering import Renderer
from diglot.teachers.loading import keeps_its_device, window_of
from diglot.vocabulary import load_tokenizer


class LocalTeacher:
    """Scores packed batches with a frozen model.

    Args:
        model: any causal language model of `transformers`. It is put in evaluation mode and gets no gradient.
        renderer: what this model reads; holds its tokenizer and vocabulary.
        max_length: longest input in tokens; the model's own limit when not given.
    """

    level = Level.HIDDEN

    def __init__(self, model: PreTrainedModel, renderer: Renderer, max_length: int | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.renderer = renderer
        self.max_length = max_length or window_of(model)
        self.head = Head.of(model)
        self.head.verify(model)

    @property
    def name(self) -> str:
        """Where the weights came from."""
        source: str = self.model.config._name_or_path
        return source

    @property
    def model_name(self) -> str:
        """The same."""
        return self.name

    def to(self, device: torch.device | str) -> None:
        """Move the weights, unless they were put where they are on purpose."""
        if not keeps_its_device(self.model):
            self.model.to(device)

    def want(self, top: int) -> None:
        """Whole rows are at hand, so any number."""

    def ask(self, side: PackedSide, stop_as_set: bool = True) -> None:
        """Nothing goes on by itself: `hidden` is called when it is needed."""

    def break_off(self) -> None:
        """Nothing is under way."""

    @contextmanager
    def running(self) -> Iterator[PreTrainedModel]:
        """The model, ready to be asked or to write."""
        yield self.model

    @torch.no_grad()
    def hidden(self, side: PackedSide) -> Tensor:
        """The hidden state that predicts each scored token, [N_t, H_t], on the device of the teacher's head."""
        return self.at_rows(side.input_ids, side.attention_mask, side.rows, (side.host_ids, side.host_rows))

    @torch.no_grad()
    def branched(
        self, side: PackedSide, branches: Branches, reading: TreeReading | None
    ) -> tuple[Tensor, TreeReading, Tensor]:
        """The hidden states behind every token of the branches, `[E, H_t]`; before, those of `hidden` if no `reading`
        of the side is there yet, `[N_t, H_t]` or `[0, H_t]`; and the reading, to go on with."""
        with self.running() as model:
            if reading is not None:
                behind = reading.more(branches)
                return behind[:0], reading, behind
            ids, mask, rows = (x.to(model.device) for x in (side.input_ids, side.attention_mask, side.rows))
            reading = TreeReading(model, ids, mask, rows)
            main, behind = reading.first(branches)
            return main, reading, behind

    def behind(self, side: PackedSide, branches: Branches) -> Tensor:
        """The second of these alone."""
        return self.branched(side, branches, None)[2]

    @torch.no_grad()
    def at_rows(self, input_ids: Tensor, attention_mask: Tensor, rows: Tensor, host: Host | None = None) -> Tensor:
        """The hidden states at `rows` of the flattened `[B * T]`; inputs are padded on the right."""
        with self.running() as model:
            ids, mask, at = (x.to(model.device) for x in (input_ids, attention_mask, rows))
            states = hidden_at_rows(model, ids, mask, at, host)
        return states.to(self.head.device or states.device)  # of a model on several devices they are elsewhere


def find_teacher_tokenizer(
    model: PreTrainedModel,
    *,
    tokenizer_name_or_path: str | None,
    model_name_or_path: str | None,
    student_name_or_path: str | None = None,
    student_tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer: the one that was named, else the one that lies beside its weights.

    `gguf_file` is the file beside the weights that holds it, `arguments` are for `load_tokenizer`. Without these a
    teacher whose weights come from the student's own place shares the student's tokenizer.

    Raises:
        TeacherError: it was not named, and the weights do not say where they come from or nothing lies there.
    """
    place = tokenizer_name_or_path or model_name_or_path or getattr(model.config, "_name_or_path", "") or None
    if (
        not arguments
        and tokenizer_name_or_path is None
        and place is not None
        and place == student_name_or_path
        and student_tokenizer
    ):
        return student_tokenizer
    advice = (
        "Give `teacher_tokenizer_name_or_path` (or pass `teacher_processing_class`): a teacher that reads ids of "
        "another vocabulary gives a finite loss and no signal."
    )
    if place is None:
        raise TeacherError(
            f"The teacher is a bare {type(model).__name__} that does not say where its weights come from, so its "
            f"tokenizer cannot be known, and cannot be shown to equal the student's. {advice}"
        )
    try:
        inside = {"gguf_file": gguf_file} if gguf_file and tokenizer_name_or_path is None else {}
        return load_tokenizer(place, arguments, revision=revision, trust_remote_code=trust_remote_code, **inside)
    except (OSError, ValueError, KeyError) as error:
        raise TeacherError(f"No tokenizer of the teacher could be loaded from {place!r}: {error} {advice}") from error
