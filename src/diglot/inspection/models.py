"""What only the weights can say: is there anything to learn, do both stop alike, what will a step cost?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from diglot.batches import PairReader, ReadPair, align_pairs
from diglot.data import Sample
from diglot.errors import DataError
from diglot.evaluation import Evaluator, OnPolicyReport, ReferenceReport
from diglot.heads import default_chunk_rows, last_hidden
from diglot.inspection.facts import ModelFacts
from diglot.inspection.texts import TEXTS
from diglot.objectives import Pair
from diglot.rendering import Conversation
from diglot.rollouts import TransformersSampler
from diglot.teachers import LocalTeacher

Result = TypeVar("Result")

_GIB = 2**30
_ADAM_MOMENTS = 2
_SEED = 0


def inspect_models(
    student: PreTrainedModel,
    teacher: LocalTeacher,
    reader: PairReader,
    samples: Sequence[Sample] | None = None,
    *,
    batch_size: int = 8,
    max_completion_length: int = 32,
) -> ModelFacts:
    """Run both models over some rows: the texts in them, and what the student answers.

    Args:
        reader: how both sides read a sample; its teacher is `teacher.renderer`.
        samples: rows of the data; the built-in texts, continued from their first words, when not given.
        batch_size: samples of a training step on one process, for the estimates.

    Raises:
        DataError: no row has both a text that can be scored and a prompt that can be continued.
    """
    rows = list(samples) if samples is not None else _continuations(TEXTS)
    pair = Pair.of_renderers(reader.student, reader.teacher)
    back = Pair.of_renderers(reader.teacher, reader.student)
    swapped = PairReader(reader.teacher, reader.student, same_vocabulary=reader.same_vocabulary)
    ours = Evaluator(student, reader, teacher, pair, batch_size=batch_size)
    theirs = Evaluator(teacher.model, swapped, teacher, back, batch_size=batch_size)
    replied = [s for s in rows if s.reply]
    reference_s, reference_t = ours.on_reference(replied), theirs.on_reference(replied)
    sampler = TransformersSampler(reader.student.stop_ids, reader.student.stop_id)
    prompts = [s.conversation for s in rows if s.conversation.messages is not None or s.conversation.text]
    if not prompts:
        raise DataError("No row has a prompt that the student could continue. Give rows with `prompt` or `messages`.")
    policy = ours.on_policy(prompts, sampler, max_new_tokens=max_completion_length, seed=_SEED)
    cost = _Cost(student, teacher, reader, pair, sampler).of(
        [prompts[i % len(prompts)] for i in range(batch_size)], max_completion_length
    )
    return ModelFacts(
        bits_per_byte_student=reference_s.bits_per_byte,
        bits_per_byte_teacher=reference_t.bits_per_byte,
        bits_per_byte_error=_difference_error(reference_s, reference_t),
        headroom_nats_per_byte=policy.reverse_kl_nats_per_byte,
        headroom_error=policy.reverse_kl_error,
        surprisal_nats_per_byte=policy.surprisal_nats_per_byte,
        stop_agreement=policy.stop_agreement,
        sample_coverage=policy.coverage,
        parameters_student=_parameters(student),
        parameters_teacher=_parameters(teacher.model),
        batch_size=batch_size,
        says=_says(reference_s, reference_t, policy),
        **cost,
    )


def _continuations(texts: Sequence[str]) -> list[Sample]:
    """Each text as a prompt of its first half and the rest as what follows."""
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts]
    return [Sample(Conversation(None, first), rest, f"built-in text {i}") for i, (first, rest) in enumerate(halves)]


def _difference_error(student: ReferenceReport, teacher: ReferenceReport) -> float:
    """Standard error of the difference in bits per byte: the texts are the same, so what they share cancels."""
    if len(student.nats) != len(teacher.nats):
        return float("nan")
    return ReferenceReport(student.nats - teacher.nats, student.num_bytes).bits_per_byte_error


def _says(student: ReferenceReport, teacher: ReferenceReport, policy: OnPolicyReport) -> tuple[str, ...]:
    """What the numbers mean, where they are clear."""
    lines = []
    gap, error = policy.reverse_kl_nats_per_byte, policy.reverse_kl_error
    if gap > 2 * error:
        lines.append(
            "The teacher is more surprised by the student's samples than the student: there is something to learn."
        )
    elif not np.isnan(error):
        lines.append("The gap on the student's own samples is within its error: little to learn, or too few samples.")
    better = student.bits_per_byte - teacher.bits_per_byte
    if better < -2 * _difference_error(student, teacher):
        lines.append("The student reads these texts better than the teacher does: is it the right teacher for them?")
    if policy.stop_agreement < 0.1:
        lines.append(
            "The two hardly agree on where to stop: look at the stop sets, and at whether the teacher knows turns."
        )
    return tuple(lines)


class _Cost:
    """Memory and time of one on-policy step, from one that is run: the student's forward and backward pass included."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: LocalTeacher,
        reader: PairReader,
        pair: Pair,
        sampler: TransformersSampler,
    ) -> None:
        self.student, self.teacher, self.reader, self.pair, self.sampler = student, teacher, reader, pair, sampler

    def of(self, prompts: Sequence[Conversation], max_new_tokens: int) -> dict[str, Any]:
        """The columns of `ModelFacts` for a step on these prompts."""
        ids = [self.reader.student.prompt_ids(c) for c in prompts]
        device = self.student.device
        written, sampling = _timed(
            lambda: self.sampler(self.student, ids, max_new_tokens=max_new_tokens, seed=_SEED), device
        )
        pairs: list[ReadPair | None] = [
            self.reader.sampled(c, w, p) for c, w, p in zip(prompts, written, ids, strict=True)
        ]
        batch = align_pairs(
            pairs, pad_s=self.reader.student.stop_id, pad_t=self.reader.teacher.stop_id, on_policy=True
        ).to(device)
        saved, training = _timed(lambda: self._step(batch.student.input_ids, batch.student.attention_mask), device)
        _, scoring = _timed(lambda: self.teacher.hidden(batch.teacher), device)
        rows = default_chunk_rows(self.pair.size_s, self.pair.size_t, device)
        rows = min(rows, len(batch.written.student.ids))
        weights_s = 4 * _parameters(self.student)  # `train` loads it in float32, whatever the file holds
        weights_t = _bytes(self.teacher.model.parameters())
        return {
            "tokens_per_text": int(batch.student.attention_mask.sum() / max(len(batch.pairs), 1)),
            "gib_weights": (weights_s + weights_t) / _GIB,
            "gib_optimizer": weights_s * (1 + _ADAM_MOMENTS) / _GIB,
            "gib_activations": saved / _GIB,
            "gib_logits": rows * 4 * 2 * (self.pair.size_s + self.pair.size_t) / _GIB,  # and what becomes of them
            "seconds_sampling": sampling,
            "seconds_student": training,
            "seconds_teacher": scoring,
        }

    def _step(self, input_ids: Tensor, attention_mask: Tensor) -> int:
        """One forward and backward pass of the student; the bytes that it kept in between, weights not counted."""
        storages: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in self.student.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        frozen = [p for p in self.student.parameters() if not p.requires_grad]
        for p in frozen:
            p.requires_grad_(True)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = last_hidden(self.student, input_ids, attention_mask)
        hidden.float().square().mean().backward()
        self.student.zero_grad(set_to_none=True)
        for p in frozen:
            p.requires_grad_(False)
        return sum(storages.values())


def _timed(run: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
