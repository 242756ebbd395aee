"""Toy students and teachers as the package's own batches: every path, with exact probability and gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from support.oracle import (
    Distribution,
    InducedDistribution,
    RandomDistribution,
    Tokens,
    Toy,
    canonical_probability,
    letters,
    paths,
    states,
    text_distribution,
)
from torch import Tensor

from diglot.batches import AlignedBatch, PairReader, align_pairs
from diglot.batches.written import WrittenSide
from diglot.objectives import Pair, Path, PathObjective
from diglot.rendering import Conversation

PROMPT = Conversation(None, "")
FLOOR = -200.0  # stands for log 0 in rows, where a real model has a small number too


# ---- paths of a student, read by both sides --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reading:
    """Student paths and the teacher's canonical reading of their texts, as one batch; path `i` is segment `i`."""

    student: Distribution
    teacher: Distribution
    tokens: Sequence[Tokens]  # [S] student paths, without stop
    mass: Tensor  # [S] the student's probability of each

    @classmethod
    def sampled(cls, student: Distribution, teacher: Distribution) -> Reading:
        """Every path that the student can write."""
        tokens, mass = zip(*paths(student), strict=True)
        return cls(student, teacher, tokens, torch.tensor(mass, dtype=torch.float64))

    @classmethod
    def canonical(cls, student: Distribution, teacher: Distribution) -> Reading:
        """The canonical path of every text, weighted by the text's probability under the student."""
        texts = text_distribution(student)
        tokens = [student.toy.canonical(text) for text in texts]
        return cls(student, teacher, tokens, torch.tensor(list(texts.values()), dtype=torch.float64))

    @cached_property
    def texts(self) -> list[bytes]:
        return [self.student.toy.spell(tokens) for tokens in self.tokens]

    @cached_property
    def pair(self) -> Pair:
        s, t = self.student.toy.renderer, self.teacher.toy.renderer
        return Pair.of(s.vocabulary, t.vocabulary, s.stop_ids, t.stop_ids, s.encoder.spell, t.encoder.spell)

    @cached_property
    def batch(self) -> AlignedBatch:
        s, t = self.student.toy, self.teacher.toy
        reader = PairReader(s.renderer, t.renderer, same_vocabulary=False)
        pairs = [reader.sampled(PROMPT, np.array([*tokens, s.stop])) for tokens in self.tokens]
        return align_pairs(pairs, pad_s=s.stop, pad_t=t.stop, on_policy=True)

    @cached_property
    def rows_s(self) -> Tensor:
        """Log-probabilities of the student's rows, `[N_s, V_s]`."""
        return _log_rows(self.student, self.tokens)

    @cached_property
    def rows_t(self) -> Tensor:
        """Log-probabilities of the teacher's rows, `[N_t, V_t]`."""
        return _log_rows(self.teacher, [self.teacher.toy.canonical(text) for text in self.texts])

    @cached_property
    def path(self) -> Path:
        """Log-probabilities of what was written, and the boundary masses, constants."""
        return Path(
            _written_logps(self.rows_s, self.batch.written.student),
            _written_logps(self.rows_t, self.batch.written.teacher),
            noncanonical=self.batch.noncanonical,
            boundary_s=_boundary(self.rows_s, self.student.toy),
            boundary_t=_boundary(self.rows_t, self.teacher.toy),
        )

    @cached_property
    def segment_s(self) -> Tensor:
        return torch.from_numpy(self.batch.written.student.segment)

    @cached_property
    def first_s(self) -> Tensor:
        """The first student token of each path, `[S]`."""
        return torch.searchsorted(self.segment_s, torch.arange(len(self.tokens)))

    @cached_property
    def lengths(self) -> Tensor:
        """Student tokens of each path, stop counted, `[S]`."""
        return torch.tensor([len(tokens) + 1 for tokens in self.tokens])

    def per_token(self, values: Tensor) -> Tensor:
        """The value of its path for each student token, `[N_s]`."""
        return values[self.segment_s]

    def per_path(self, values: Tensor) -> Tensor:
        """Sums of student token values over each path, `[S]`."""
        return values.new_zeros(len(self.tokens)).index_add(0, self.segment_s, values)

    def teacher_logps(self) -> Tensor:
        """`log q_canonical` of each text, `[S]`, from the oracle."""
        return log_of(canonical_probability(self.teacher, text) for text in self.texts)


def _boundary(rows: Tensor, toy: Toy) -> Tensor:
    """Log mass of "a space follows, or the end", `[N]`."""
    breaking = [i for i, piece in enumerate(toy.pieces) if piece.startswith(b" ") or i == toy.stop]
    return rows[:, breaking].logsumexp(-1)


def _log_rows(distribution: Distribution, tokens: Sequence[Tokens]) -> Tensor:
    return _log(np.stack([distribution.row(state) for path in tokens for state in states(distribution, path)]))


def _log(rows: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(np.log(rows, out=np.full_like(rows, FLOOR), where=rows > 0))


def _written_logps(rows: Tensor, side: WrittenSide) -> Tensor:
    return rows.gather(-1, torch.from_numpy(side.ids)[:, None]).squeeze(-1)


def log_of(probabilities: Any) -> Tensor:
    return torch.tensor(list(probabilities), dtype=torch.float64).log()


# ---- gradients with respect to the logits of every state of the student ----------------------------------------------


@dataclass(frozen=True, eq=False)
class Learner:
    """The student of a reading as a table of logits, a row for each state: what every other parametrisation feeds."""

    reading: Reading

    @cached_property
    def visited(self) -> list[Any]:
        """The state before each written token, `[N_s]`."""
        return [s for tokens in self.reading.tokens for s in states(self.reading.student, tokens)]

    @cached_property
    def logits(self) -> Tensor:
        """`[states, V_s]`."""
        known = dict.fromkeys(self.visited)
        rows = np.stack([self.reading.student.row(state) for state in known])
        return _log(rows).requires_grad_()

    def logp(self) -> Tensor:
        """Log-probability of each written token, `[N_s]`, stop included, with gradient."""
        index = {state: i for i, state in enumerate(dict.fromkeys(self.visited))}
        rows = self.logits.log_softmax(-1)[[index[state] for state in self.visited]]
        return _written_logps(rows, self.reading.batch.written.student)

    def gradient(self, total: Tensor) -> Tensor:
        """Of one number with respect to all logits, flat."""
        return torch.autograd.grad(total, self.logits)[0].flatten()

    def expected_gradient(self, objective: PathObjective) -> Tensor:
        """What the objective's gradient is on average over texts that the student writes."""
        reading = self.reading
        logp = self.logp()
        values, mask = objective(replace(reading.path, logp_s=logp), reading.batch.alignment)
        by_token = len(values.loss) == len(logp)
        weight = reading.mass[reading.segment_s] if by_token else reading.mass
        return self.gradient((weight * values.loss)[mask].sum())

    def credited_gradient(self, credit: Tensor) -> Tensor:
        """The policy gradient on average, if token `i` is credited with the constant `credit[i]`, `[N_s]`."""
        return self.gradient(-(self.reading.mass[self.reading.segment_s] * credit * self.logp()).sum())

    def expectation_gradient(self, value: Callable[[Tensor], Tensor]) -> Tensor:
        """Gradient of `sum over paths of p(path) * value(log p(path))`, by autograd on the enumerated sum."""
        logp = self.reading.per_path(self.logp())
        return self.gradient((logp.exp() * value(logp)).sum())


def relative(actual: Tensor, wanted: Tensor) -> float:
    """Size of the difference of two vectors, as a share of the wanted one's."""
    return float((actual - wanted).norm() / wanted.norm())


def turned(actual: Tensor, wanted: Tensor) -> float:
    """1 - cosine: 0 for the same direction, 1 for a right angle."""
    return 1 - float(torch.nn.functional.cosine_similarity(actual, wanted, dim=0))


# ---- settings --------------------------------------------------------------------------------------------------------


@lru_cache
def random_pair(student: Callable[[], Toy], teacher: Callable[[], Toy], limit: int = 4) -> Reading:
    """All paths of a random student, against a random teacher."""
    return Reading.sampled(RandomDistribution(student(), limit, seed=1), RandomDistribution(teacher(), limit, seed=2))


@lru_cache
def fixed_pair(student: Callable[[], Toy], teacher: Callable[[], Toy]) -> Reading:
    """As `random_pair`, but the student writes two tokens, neither more nor fewer."""
    return Reading.sampled(
        RandomDistribution(student(), 6, seed=1, exactly=2), RandomDistribution(teacher(), 6, seed=2)
    )


@lru_cache
def canonical_pair(student: Callable[[], Toy], teacher: Callable[[], Toy], limit: int = 4) -> Reading:
    """The canonical path of all texts, random student and teacher."""
    return Reading.canonical(RandomDistribution(student(), limit, seed=1), RandomDistribution(teacher(), limit, seed=2))


@lru_cache
def perfect_pair(student: Callable[[], Toy], teacher: Callable[[], Toy], limit: int = 4) -> Reading:
    """Both carry one distribution over text, each on its own canonical tokens: nothing is left to learn."""
    texts = text_distribution(RandomDistribution(letters(), limit, seed=3))
    return Reading.sampled(InducedDistribution(student(), texts), InducedDistribution(teacher(), texts))


# ---- what is claimed -------------------------------------------------------------------------------------------------

Row = dict[str, Any]
Claim = Callable[[str, str, float, str], Row]


def claims(objective: str, names: str) -> Claim:
    """Rows of one objective on one pair. kind: "exact" (the gap is rounding), "bound" or "approximate"."""

    def row(claim: str, kind: str, gap: float, unit: str) -> Row:
        return {"objective": objective, "claim": f"{names}: {claim}", "kind": kind, "gap": gap, "unit": unit}

    return row
