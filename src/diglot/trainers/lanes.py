"""Several teachers: each in a lane of its own, with its tokenizer, template, alignment and terms of the loss.

The student writes once and is run once; every lane reads the same text. The estimator is the weighted mean of the
lanes' losses.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diglot.batches import AlignedBatch, PackedSide, PairReader
from diglot.data import Sample
from diglot.errors import ConfigError, DataError
from diglot.objectives import Pair
from diglot.teachers import Teacher
from diglot.trainers.config import DistillationConfig
from diglot.trainers.sides import Sides, prepare_sides
from diglot.trainers.terms import Term

_OPTIONS = {
    "tokenizer": "teacher_tokenizer_name_or_path",
    "revision": "teacher_model_revision",
    "init_kwargs": "teacher_model_init_kwargs",
    "chat_template_kwargs": "teacher_chat_template_kwargs",
    "max_length": "teacher_max_length",
    "system_prompt": "teacher_system_prompt",
}


@dataclass
class Lane:
    """One teacher, what it reads, and what is compared with it."""

    sides: Sides
    label: str
    weight: float  # weights of all lanes add up to 1
    teacher: Teacher
    pair: Pair
    same_vocabulary: bool
    reader: PairReader
    terms: list[Term] = field(default_factory=list)
    references: Any = None
    cached: Any = None
    held: list[AlignedBatch] | None = None


def prepare_lanes(
    student: Any, teacher: Any, tokenizer: Any, teacher_tokenizer: Any, args: DistillationConfig
) -> list[Lane]:
    """One lane for each teacher that is asked for; see `prepare_sides`.

    Raises:
        ConfigError: also for an empty list, an unknown key, weights that are not positive, or equal labels.
    """
    asked = args.teacher_model_name_or_path if teacher is None else teacher
    if not isinstance(asked, (list, tuple)):
        return [_lane(prepare_sides(student, teacher, tokenizer, teacher_tokenizer, args), "teacher", 1.0)]
    entries = [dict(one) if isinstance(one, Mapping) else {"name": one} for one in asked]
    tokenizers = teacher_tokenizer if isinstance(teacher_tokenizer, (list, tuple)) else [teacher_tokenizer] * len(asked)
    if not entries or len(tokenizers) != len(entries):
        raise ConfigError(f"There are {len(entries)} teachers and {len(tokenizers)} tokenizers of them: give one each.")
    weights = [_weight(entry) for entry in entries]
    labels = [str(entry.pop("label", None) or _name(entry, i)) for i, entry in enumerate(entries)]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"The teachers are called {labels}: give each its own `label`.")
    if sum(weights) <= 0:
        raise ConfigError(f"The teachers' weights are {weights}: at least one must be greater than 0.")
    lanes: list[Lane] = []
    for entry, own, label, weight in zip(entries, tokenizers, labels, weights, strict=True):
        if lanes:
            student, tokenizer = lanes[0].sides.student, lanes[0].sides.renderer.tokenizer
        sides = prepare_sides(student, entry.pop("name"), tokenizer, own, _args_of(entry, args, bool(lanes)))
        lanes.append(_lane(sides, label, weight / sum(weights)))
        lanes[-1].reader.label = label
    return lanes


def _lane(sides: Sides, label: str, weight: float) -> Lane:
    return Lane(sides, label, weight, sides.teacher, sides.pair, sides.same_vocabulary, sides.reader)


def _name(entry: Mapping[str, Any], i: int) -> str:
    if entry.get("name") is None:
        raise ConfigError(f"Teacher {i + 1} has no `name`. Write {{name: MODEL, weight: 1.0}}.")
    return entry["name"] if isinstance(entry["name"], str) else f"teacher{i + 1}"


def _weight(entry: dict[str, Any]) -> float:
    weight = float(entry.pop("weight", 1.0))
    if not weight >= 0:
        raise ConfigError(f"A teacher's weight is {weight}: it must be 0 or more.")
    return weight


def _args_of(entry: Mapping[str, Any], args: DistillationConfig, student_is_loaded: bool) -> DistillationConfig:
    """The options as this teacher sees them: its own where its entry has them."""
    if wrong := sorted(entry.keys() - _OPTIONS.keys()):
        known = ", ".join(["name", "weight", "label", *_OPTIONS])
        raise ConfigError(f"{', '.join(wrong)}: no key of a teacher in teacher_model_name_or_path; keys are {known}.")
    own = copy.copy(args)
    for name, value in entry.items():
        setattr(own, _OPTIONS[name], value)
    if student_is_loaded:
        own.model_init_kwargs = None
    return own


def _of_lane(name: str) -> Any:
    """An attribute of the lane that is at work."""

    def read(self: Any) -> Any:
        return getattr(self._lane, name)

    def write(self: Any, value: Any) -> None:
        setattr(self._lane, name, value)

    return property(read, write)


class HasLanes:
    """What a trainer does lane by lane. Inside of `at`, `teacher`, `pair`, `reader` and `terms` are that lane's."""

    lanes: list[Lane]
    _lane: Lane
    _read: list[tuple[PackedSide, Tensor]] | None = None  # what the student was run on, while lanes share it
    _drawn: dict[bytes, list[Any]]  # completions of this window, by their prompts

    teacher = _of_lane("teacher")
    pair = _of_lane("pair")
    same_vocabulary = _of_lane("same_vocabulary")
    reader = _of_lane("reader")
    terms = _of_lane("terms")
    references = _of_lane("references")
    cached_teacher = _of_lane("cached")
    _held = _of_lane("held")

    def _set_lanes(self, lanes: list[Lane]) -> None:
        self.lanes, self._lane, self._drawn = lanes, lanes[0], {}

    @contextmanager
    def at(self, lane: Lane) -> Iterator[None]:
        """Work on one lane; the one before is back afterwards."""
        before, self._lane = self._lane, lane
        try:
            yield
        finally:
            self._lane = before

    def each_lane(self) -> Iterator[Lane]:
        """Every lane, at work while it is the loop's."""
        for lane in self.lanes:
            with self.at(lane):
                yield lane

    def lane_weights(self, samples: Sequence[Sample]) -> tuple[list[float], bool]:
        """The factor of each lane's loss in a window, and whether rows are routed.

        Raises:
            DataError: a row names a teacher that there is not, or some rows name one and others do not.
        """
        labels = [lane.label for lane in self.lanes]
        routes = {s.conversation.route: s.where for s in samples}
        if set(routes) == {None}:
            return [lane.weight for lane in self.lanes], False
        for route, where in routes.items():
            if route not in labels:
                named = "names no `teacher`, as other rows do" if route is None else f"names the teacher {route!r}"
                raise DataError(f"{where} {named}; there are {', '.join(labels)}. Name one of them in every row.")
        return [1.0] * len(self.lanes), True

    def lanes_loss(self, model: nn.Module, batches: Sequence[AlignedBatch], weights: Sequence[float]) -> Tensor:
        """The weighted sum of the lanes' shares; lanes that read the same student tokens share its forward pass."""
        self._read = []
        try:
            loss: Any = 0.0
            for lane, batch, weight in zip(self.lanes, batches, weights, strict=True):
                with self.at(lane):
                    loss = loss + weight * self.batch_loss(model, batch)  # type: ignore[attr-defined]
            return loss
        finally:
            self._read = None


def share_counts(found: Sequence[Sequence[AlignedBatch]]) -> None:
    """Routed rows: every item counts alike, whichever lane it is in. Terms are matched by their place in the list.

    What a lane counted itself stays beside the totals: batches that serve several steps come here again.
    """
    own = [_own_counts(batches[0].counts or {}) for batches in found]
    totals = [sum(values) for values in zip(*(one.values() for one in own), strict=True)]
    for batches, counts in zip(found, own, strict=True):
        joint = {**dict(zip(counts, totals, strict=True)), **{_OWN + name: n for name, n in counts.items()}}
        for batch in batches:
            batch.counts = joint


_OWN = "own:"


def _own_counts(counts: Mapping[str, float]) -> dict[str, float]:
    """A lane's own counts; those of the reference text are made anew for every step."""
    names = [name for name in counts if not name.startswith(_OWN)]
    return {name: counts[name] if name == "lm" else counts.get(_OWN + name, counts[name]) for name in names}


def mean_metrics(measured: Sequence[tuple[float, Mapping[str, float]]]) -> dict[str, float]:
    """Weighted means of the lanes' metrics, over those lanes that have one: a route may lead no row to a teacher."""
    found = {}
    for name in dict.fromkeys(name for _, one in measured for name in one):
        known = [(weight, one[name]) for weight, one in measured if not math.isnan(one.get(name, math.nan))]
        total = sum(weight for weight, _ in known)
        found[name] = sum(weight * value for weight, value in known) / total if total else math.nan
    return found


def same_side(a: PackedSide, b: PackedSide) -> bool:
    """Do two sides of a batch hold the same tokens, scored at the same places?"""
    pairs = ((a.input_ids, b.input_ids), (a.attention_mask, b.attention_mask), (a.rows, b.rows))
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in pairs)
