"""Everything that `diglot eval` measures of one model, alone or against a teacher, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from diglot.batches import PairReader
from diglot.data import Sample
from diglot.disk import finite
from diglot.evaluation.bootstrap import with_interval
from diglot.evaluation.evaluator import Evaluator
from diglot.evaluation.reports import OnPolicyReport, Sums
from diglot.evaluation.texts import repetition
from diglot.evaluation.words import first_word, next_words, places
from diglot.objectives import Pair
from diglot.rendering import Renderer
from diglot.rollouts import TransformersSampler
from diglot.teachers import LocalTeacher
from diglot.teachers.loading import window_of


@dataclass(frozen=True)
class Side:
    """A model and what it reads."""

    name: str
    model: PreTrainedModel
    renderer: Renderer

    @property
    def max_length(self) -> int | None:
        """The longest input of the model in its own tokens, if it has a limit."""
        return window_of(self.model)


@dataclass(frozen=True)
class Measure:
    """One number. `low` and `high` are the 95% bootstrap interval over samples, NaN where there is none."""

    value: float
    low: float
    high: float
    unit: str

    def as_json(self) -> dict[str, Any]:
        """Plain values; None for what is not a number."""
        values: dict[str, Any] = finite(asdict(self))
        return values


@dataclass(frozen=True)
class Plan:
    """How much is measured. Completions are sampled at temperature 1: the model's own distribution."""

    max_completion_length: int = 128
    batch_size: int = 8
    words_per_sample: int = 4
    seed: int = 0


def measure(side: Side, teacher: Side | None, samples: Sequence[Sample], plan: Plan) -> dict[str, Measure]:
    """The measures of one model by name; those that need a teacher, or replies in the data, where there are any."""
    replies = [sample for sample in samples if sample.reply]
    other = teacher or side
    evaluator = _evaluator(side, other, plan)
    sums: dict[str, tuple[Sums, Sums, str]] = {}
    if replies:
        reference = evaluator.on_reference(replies)
        sums["bits_per_byte"] = reference.nats / math.log(2), reference.num_bytes, "bits per byte"
        ended = reference.ended  # a reply that was cut has no end at which a stop could be expected
        sums["stop/at_end"] = reference.stop_at_end * ended, ended, "probability"
        sums["stop/expected_per_reply"] = reference.stop_expected * ended, ended, "stops; 1 is calibrated"
        sums |= _words(side, teacher, replies, plan)
    written = _write(evaluator, side, samples, plan)
    sums |= _written(written, "samples")
    if teacher is not None:
        sums["kl/student_to_teacher"] = written.gap, written.num_bytes, "nats per byte, on the student's samples"
        backward = _write(_evaluator(teacher, side, plan), teacher, samples, plan)
        sums["kl/teacher_to_student"] = backward.gap, backward.num_bytes, "nats per byte, on the teacher's samples"
        sums["stop/agreement"] = written.stop_common, written.stop_either, "overlap on the student's samples"
        sums["coverage"] = written.covered, written.tokens, "share of tokens"
        if replies:
            excess = evaluator.reference_gap(replies)
            sums["reference/gap"] = excess[0], excess[1], "nats per byte, teacher's log-likelihood - student's"
    return {name: Measure(*with_interval(top, low, plan.seed), unit) for name, (top, low, unit) in sums.items()}


def _evaluator(side: Side, other: Side, plan: Plan) -> Evaluator:
    """`side` writes or reads, `other` judges."""
    mine, theirs = side.renderer, other.renderer
    pair = Pair.of_renderers(mine, theirs)
    judge = LocalTeacher(other.model, theirs)
    reader = PairReader(
        mine, theirs, same_vocabulary=pair.same, max_length=side.max_length, teacher_max_length=judge.max_length
    )
    return Evaluator(side.model, reader, judge, pair, batch_size=plan.batch_size)


def _write(evaluator: Evaluator, side: Side, samples: Sequence[Sample], plan: Plan) -> OnPolicyReport:
    sampler = TransformersSampler(side.renderer.stop_ids, side.renderer.stop_id)
    conversations = [sample.conversation for sample in samples]
    return evaluator.on_policy(conversations, sampler, max_new_tokens=plan.max_completion_length, seed=plan.seed)


def _written(report: OnPolicyReport, prefix: str) -> dict[str, tuple[Sums, Sums, str]]:
    """Statistics of what was written, which need no other model."""
    ones = np.ones(len(report.num_bytes))
    repeated = np.array([repetition(text) for text in report.completions], dtype=np.float64).reshape(-1, 2)
    return {
        f"{prefix}/length": (report.num_bytes, ones, "bytes"),
        f"{prefix}/stopped": (report.stopped, ones, "share"),
        f"{prefix}/repetition": (repeated[:, 0], repeated[:, 1], "share of text"),
        f"{prefix}/entropy": (report.surprisal, report.num_bytes, "nats per byte"),
    }


def _words(
    side: Side, teacher: Side | None, replies: Sequence[Sample], plan: Plan
) -> dict[str, tuple[Sums, Sums, str]]:
    """Greedy next words at the same places of the replies, against the text's own word and the teacher's."""
    prefixes = [
        (row, sample, k)
        for row, sample in enumerate(replies)
        for k in places(str(sample.reply), plan.words_per_sample, f"{plan.seed}/{row}")
    ]
    own = _ask(side, prefixes, plan)
    truth = [first_word(str(sample.reply)[k:]) for _, sample, k in prefixes]
    sums = {"next_word/accuracy": _share(prefixes, own, truth, len(replies), "share; the text's own word")}
    if teacher is not None:
        theirs = _ask(teacher, prefixes, plan)
        sums["next_word/agreement"] = _share(prefixes, own, theirs, len(replies), "share; the teacher's word")
    return sums


def _ask(side: Side, prefixes: Sequence[tuple[int, Sample, int]], plan: Plan) -> list[str | None]:
    questions = [(sample, k) for _, sample, k in prefixes]
    return next_words(side.model, side.renderer, questions, max_length=side.max_length, batch_size=4 * plan.batch_size)


def _share(
    prefixes: Sequence[tuple[int, Sample, int]], left: Sequence[Any], right: Sequence[Any], rows: int, unit: str
) -> tuple[Sums, Sums, str]:
    """How often both are equal, counted by row; places that one side could not read do not count."""
    same, all_of = np.zeros(rows), np.zeros(rows)
    for (row, _, _), a, b in zip(prefixes, left, right, strict=True):
        if a is not None and b is not None:
            same[row] += a == b
            all_of[row] += 1
    return same, all_of, unit
