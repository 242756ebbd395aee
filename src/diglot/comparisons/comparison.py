"""A comparison with one teacher, and a batch: the student's texts, with one view of them for each comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from diglot.batches import AlignedBatch, PackedSide, PairReader, ReadPair, align_pairs, pack, pad_id, sampler_logps
from diglot.comparisons.terms import Term
from diglot.errors import TeacherError
from diglot.heads import Branches, TreeReading, default_chunk_rows
from diglot.objectives import Pair, Plan, Rollout
from diglot.objectives.tail import TailTokens
from diglot.rendering import Conversation, Role
from diglot.rollouts import Completion
from diglot.rollouts.ahead import Row
from diglot.teachers import CachedTeacher, LocalTeacher, Teacher, WholeRows, gives_rows, scores_chosen, whole_rows

if TYPE_CHECKING:  # it needs packages that not everyone has
    from diglot.teachers.scored import StoredScores
    from diglot.teachers.served import TextScores

T = TypeVar("T")
Read = tuple["ReadPair | None", ...]
"""What each comparison reads of one text; None where it reads nothing."""


@dataclass(frozen=True)
class Texts:
    """The texts of a window, as each comparison reads them, and where they come from."""

    reads: list[list[Read]]  # of each micro-batch
    on_policy: bool
    from_data: bool = False  # they come again in later epochs
    by_all: bool = True  # is every teacher meant to read every text?


@dataclass(frozen=True)
class Comparison:
    """One teacher: what it reads, and what of it the student is compared with."""

    label: str
    weight: float  # of its loss; those of all comparisons add up to 1
    reader: PairReader
    teacher: Teacher
    pair: Pair  # on the training device, once the terms are made: objectives are built of host arrays
    terms: tuple[Term, ...] = ()
    references: tuple[LocalTeacher, LocalTeacher] | None = None  # student before training, reference teacher
    cache: CachedTeacher | None = None  # of what the teacher says about texts of the data
    temperature: float = 1.0  # `kd_temperature`
    rows_per_chunk: int | None = None
    unscored_roles: frozenset[Role] = frozenset()
    asks: bool = True  # or do its terms need nothing of the teacher?

    @property
    def stop_as_set(self) -> bool:
        """Is the stop event more than the id that was written? Whichever id ends a turn, it is one event."""
        return len(self.pair.stop_s) > 1 or len(self.pair.stop_t) > 1

    def chunk_rows(self, few_columns: bool = False) -> int:
        """Rows of logits that exist at a time."""
        sizes, device = (self.pair.size_s, self.pair.size_t), self.pair.stop_s.device
        return self.rows_per_chunk or default_chunk_rows(*sizes, device, few_columns=few_columns)

    def align(self, pairs: Sequence[ReadPair | None], on_policy: bool) -> AlignedBatch:
        """The texts padded and aligned, on the training device."""
        batch = align_pairs(
            pairs,
            pad_s=pad_id(self.reader.student),
            pad_t=pad_id(self.teacher.renderer),
            on_policy=on_policy,
            unscored_roles=self.unscored_roles,
        )
        return batch.to(self.pair.stop_s.device)

    def view(self, pairs: Sequence[ReadPair | None], on_policy: bool, from_data: bool = False) -> View:
        """This comparison's view of some texts. Plans come first: what they need of the teacher can be asked with it.

        A served teacher is asked now, so that its answers come while the student works.
        """
        read = self.align(pairs, on_policy)
        plans = {term.name: term.objective.plan(read.written) for term in self.terms}
        teacher, cache = self.teacher if self.asks else None, self.cache if from_data else None
        answers = Answers(teacher, read.teacher, self.stop_as_set, cache)
        return View(self, read, plans, answers)

    def teacher_prompts(self, conversations: Sequence[Conversation]) -> list[np.ndarray]:
        """What the teacher reads before it writes, in its own ids: inside a think block where the student is."""
        thinking = [self.reader.student.opens_thinking(c) for c in conversations]
        reads = map(self.reader.teacher_reads, conversations)
        return [self.teacher.renderer.prompt_ids(c, thinking=t) for c, t in zip(reads, thinking, strict=True)]


class Answers:
    """What one teacher says about one batch. Nothing of a local teacher is computed before it is read, or twice."""

    def __init__(
        self, teacher: Teacher | None, side: PackedSide, stop_as_set: bool = True, cache: CachedTeacher | None = None
    ) -> None:
        self._teacher, self._side, self._cache = teacher, side, cache
        self._pending: Any = None if teacher is None else teacher.ask(side, stop_as_set)
        self._gives_rows = teacher is not None and gives_rows(teacher)
        self._made: dict[object, Any] = {}

    def once(self, by: object, make: Callable[[], T]) -> T:
        """`make()`, and from then on what it gave."""
        if by not in self._made:
            self._made[by] = make()
        value: T = self._made[by]
        return value

    @property
    def text_scores(self) -> TextScores | StoredScores | None:
        """What a teacher that gives no hidden states has answered; waits for it."""
        return None if self._pending is None or self._gives_rows else self._pending.result()

    @cached_property
    def hidden(self) -> Tensor:
        """The teacher's hidden states, `[N_t, H_t]`. `TeacherError` if it gives none."""
        teacher = self._whole
        if self._pending is not None:
            answered: Tensor = self._pending.result()
            return answered
        return teacher.hidden(self._side) if self._cache is None else self._cache.hidden(self._side)

    def release(self) -> None:
        """Keep the states of a local teacher no longer: they are computed anew if they are read again."""
        self.__dict__.pop("hidden", None)

    def branched(self, tail: TailTokens, reading: TreeReading | None) -> tuple[Tensor, TreeReading | None]:
        """The states behind each token of branches off the text, `[E, H_t]`, and a reading of it to go on with.

        A branch is a few tokens in the place of the scored token `before` and what follows it; `depth` counts them.
        """
        after = self._side.host_rows[tail.before]
        teacher, branches = self._whole, Branches(tail.ids, after, tail.depth)
        if not isinstance(teacher, LocalTeacher):
            return teacher.behind(self._side, branches), None
        main, reading, behind = teacher.branched(self._side, branches, reading)
        if len(main):
            self.__dict__.setdefault("hidden", main)  # one pass serves the other terms, too
        return behind, reading

    def chosen(self, token: Tensor, ids: Tensor) -> Tensor:
        """Log-probs of `ids` in the rows that predict the teacher's scored tokens `token`, `[Q]` nats, on the CPU.

        For a teacher that gives no rows; waits for its server. `TeacherError` if it does not score chosen ids.
        """
        if self._teacher is None or not scores_chosen(self._teacher):
            raise TeacherError("This teacher does not score chosen ids. Choose an objective that needs less of it.")
        return self._teacher.chosen(self._side, token, ids)

    @property
    def _whole(self) -> WholeRows:
        if self._teacher is None:
            raise TeacherError("This text has no teacher. Choose an objective that asks none, such as 'ce'.")
        return whole_rows(self._teacher, "This objective")


@dataclass(frozen=True)
class View:
    """One comparison's part of a batch."""

    comparison: Comparison
    read: AlignedBatch  # its texts on both sides
    plans: Mapping[str, Plan]  # of each term
    answers: Answers
    texts: list[int] | None = None  # which of the batch's texts it reads; None: all of them
    tokens: Tensor | None = None  # int64 [N_s] their tokens among the batch's scored ones
    missing: float = 0.0  # scored student tokens of texts that it should read and does not
    rollout: Rollout | None = None  # where the texts serve several optimizer steps
    weight: float = 1.0  # of its loss in this window
    counts: Mapping[str, float] = field(default_factory=dict)  # items of each term, of the window and all ranks

    def of_own(self, values: Tensor) -> Tensor:
        """Values of the batch's scored tokens, `[N, ...]`, for those of this view."""
        return values if self.tokens is None else values[self.tokens]

    def release(self) -> None:
        """Its loss is formed: let go of the teacher's states, unless the texts serve more steps."""
        if self.rollout is None:
            self.answers.release()

    def items(self) -> dict[str, float]:
        """Items of each term in this batch."""
        return {term.name: float(self.plans[term.name].items) for term in self.comparison.terms}


@dataclass
class Batch:
    """Texts that the student is run on once, and how each comparison reads them."""

    student: PackedSide
    pairs: list[ReadPair]  # of each text, as the first comparison that has one reads it
    places: list[int]  # of each text in its window, in the order of the data
    on_policy: bool
    views: list[View]
    scored: float  # student tokens that the loss may be about
    logp_sampler: Tensor | None = None  # [N_s] nats, what the engine that sampled the texts said about them
    sampler_weight: Tensor | None = None  # [N_s] the student's probability over the engine's, cut; set when measured
    reference: Batch | None = None  # texts to imitate beside these (MiniLLM)

    @property
    def parts(self) -> list[Batch]:
        """All that the loss is a sum over."""
        return [self] if self.reference is None else [self, self.reference]


def read_completions(
    comparisons: Sequence[Comparison], rows: Sequence[Sequence[Row]], written: Sequence[Completion]
) -> list[list[Read]]:
    """What the student wrote for the rows of each micro-batch that have a prompt, as every comparison reads it."""
    completions = iter(written)
    return [[_read(comparisons, c, p, None if p is None else next(completions)) for c, p, _ in batch] for batch in rows]


def _read(
    comparisons: Sequence[Comparison], conversation: Conversation, prompt: Any, completion: Completion | None
) -> Read:
    if completion is None:
        return (None,) * len(comparisons)
    pairs = [one.reader.sampled(conversation, completion.ids, prompt) for one in comparisons]
    logps = completion.logps
    return tuple(pair if pair is None or logps is None else pair.with_logps(logps) for pair in pairs)


def make_batch(
    comparisons: Sequence[Comparison],
    reads: Sequence[Read],
    places: Sequence[int],
    *,
    on_policy: bool,
    from_data: bool = False,
    by_all: bool = True,
) -> Batch:
    """One micro-batch. Texts that no comparison reads take no place in it.

    Args:
        places: of each text in its window.
        from_data: are they texts of the data, which come again?
        by_all: is every teacher meant to read every text? What one could not read counts as not covered then.
    """
    placed = [(place, read) for place, read in zip(places, reads, strict=True) if any(p is not None for p in read)]
    pairs = [next(pair for pair in read if pair is not None) for _, read in placed]
    own = [[read[k] for _, read in placed] for k in range(len(comparisons))]
    views = [c.view(of_c, on_policy, from_data) for c, of_c in zip(comparisons, own, strict=True)]
    first = comparisons[0]
    whole = next((v.read.student for v, p in zip(views, own, strict=True) if None not in p), None)
    if whole is None:
        segments = [len(pair.student.segment_bytes) for pair in pairs]
        whole = pack([p.student for p in pairs], segments, pad_id(first.reader.student)).to(first.pair.stop_s.device)
    sizes = [_scored(pair, first.unscored_roles) for pair in pairs]
    views = [_of_some(v, of_c, whole, sizes, by_all) for v, of_c in zip(views, own, strict=True)]
    logps = sampler_logps(pairs)
    return Batch(
        whole,
        pairs,
        [place for place, _ in placed],
        on_policy,
        views,
        float(sum(sizes)),
        None if logps is None else logps.to(whole.rows.device),
    )


def _of_some(
    view: View, pairs: Sequence[ReadPair | None], whole: PackedSide, sizes: Sequence[int], by_all: bool
) -> View:
    """A view that knows which of the batch's tokens are its own."""
    absent = [i for i, pair in enumerate(pairs) if pair is None]
    if not absent:
        return view
    text = torch.div(whole.rows, whole.input_ids.shape[1], rounding_mode="floor")
    lost = torch.isin(text, torch.tensor(absent, device=text.device))
    missing = float(sum(sizes[i] for i in absent)) if by_all else 0.0
    texts = [i for i, pair in enumerate(pairs) if pair is not None]
    return replace(view, texts=texts, tokens=(~lost).nonzero()[:, 0], missing=missing)


def _scored(pair: ReadPair, unscored: frozenset[Role]) -> int:
    roles, scored = pair.student.roles, pair.student.segment >= 0
    return int((scored & ~np.isin(roles, [int(role) for role in unscored])).sum())
