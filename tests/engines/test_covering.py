"""What a teacher's named tokens say about the student's next one, against a teacher whose distribution is known.

The teacher writes one of all texts of up to five letters with a known probability, always in its own tokens, so what a
student with the same distribution over texts expects next, in its own tokens, is a sum over texts. The teacher's rows
are those of the text as it was written: nothing more is asked.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import toys
from laboratory import MERGES

from diglot.batches import PairReader, align_pairs
from diglot.data import to_sample
from diglot.engines import Projected, Projector, Reading, TeacherScores
from diglot.rendering import Renderer

SPACE = toys.Texts(length=5, prompts=("a",))
MASS = SPACE.random_distribution(5)[0]
TEXTS = [SPACE.strings[i] for i in np.random.default_rng(0).choice(len(MASS), 60, p=MASS / MASS.sum())]
Tokens = tuple[int, ...]


class Writer:
    """Expects each next token as one who writes every text with its probability in its tokenizer's own tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.width, self.mass = len(tokenizer), Counter[tuple[Tokens, int]]()
        for text, mass in zip(SPACE.strings, MASS, strict=True):
            path = (*toys.encode(tokenizer, text), toys.STOP)
            for n in range(len(path)):
                self.mass[path[:n], path[n]] += mass

    def row(self, before: Tokens) -> np.ndarray:
        """Masses `[V]` of the next token; zero where no text has these tokens."""
        row = np.array([self.mass[before, i] for i in range(self.width)])
        return row / max(row.sum(), 1e-300)


class Case:
    """A pair, and what comes back when a teacher's `top` likeliest ids of each row are projected."""

    def __init__(self, pair: str, top: int, texts: list[str] = TEXTS) -> None:
        student, teacher = (Renderer(toys.bpe(merges), name=pair) for merges in MERGES[pair])
        reader = PairReader(student, teacher, same_vocabulary=False)
        reads = [reader.written(to_sample({"prompt": "a", "completion": text}, where="test")) for text in texts]
        batch = align_pairs(reads, pad_s=student.stop_id, pad_t=teacher.stop_id, on_policy=False)
        self.written, self.writer = batch.written, Writer(student.tokenizer)
        t, other = batch.written.teacher, Writer(teacher.tokenizer)
        rows = np.array([other.row(self.before(t, j)) for j in range(len(t.ids))])
        order = np.argsort(-rows, -1, kind="stable")[:, :top]
        with np.errstate(divide="ignore"):
            named, own = np.log(np.take_along_axis(rows, order, -1)), np.log(rows[np.arange(len(t.ids)), t.ids])
        place = np.arange(len(t.ids)) + 1  # behind one token of a prompt
        reading = Reading(
            batch.written.student.ids,
            np.append(1, t.ids),
            np.arange(len(batch.written.student.ids)),
            place,
            batch.written,
            sum(map(len, texts)),
            np.ones(len(batch.written.student.ids), dtype=np.bool_),
        )
        self.scores = TeacherScores(
            np.append(0.0, own), np.pad(order, ((1, 0), (0, 0))), np.pad(named, ((1, 0), (0, 0)))
        )
        self.reading = reading
        self.result: Projected = Projector(student, teacher).project(reading, self.scores)
        self.student, self.teacher = student, teacher

    def before(self, side: Any, at: int) -> Tokens:
        """The tokens of the turn before one."""
        return tuple(side.ids[np.flatnonzero(side.segment[:at] == side.segment[at])].tolist())

    def truth(self, k: int) -> np.ndarray:
        """What the student expects at a row, `[V]`."""
        assert self.result.at is not None
        row = self.writer.row(self.before(self.written.student, int(self.result.at[k])))
        assert row.sum() == pytest.approx(1)
        return row

    def differences(self) -> np.ndarray:
        """Total variation of each row to the truth, all that is not named taken as one."""
        top, gaps = self.result.likeliest, []
        assert top is not None
        for k, residual in enumerate(top.residual.tolist()):
            truth, ids = self.truth(k), top.ids[k][top.ids[k] >= 0]
            masses = np.exp(top.logps[k][: len(ids)])
            assert len(set(ids.tolist())) == len(ids) and masses.sum() + residual == pytest.approx(1)
            gaps.append(np.abs(truth[ids] - masses).sum() / 2 + abs(1 - truth[ids].sum() - residual) / 2)
        return np.array(gaps)


@pytest.mark.parametrize(("pair", "exact"), [("finer", 0.6), ("coarser", 0.15), ("overlapping", 0.12)])
def test_with_whole_rows_a_named_token_has_its_own_mass_or_at_most_the_unknown_more(pair: str, exact: float) -> None:
    """And where nothing is unknown it is the exact distribution."""
    case = Case(pair, top=100)
    answer = case.result.likeliest
    assert answer is not None and case.result.at is not None
    assert len(case.result.at) == len(case.written.student.ids)
    for k, unknown in enumerate(answer.unknown.tolist()):
        truth, ids = case.truth(k), answer.ids[k][answer.ids[k] >= 0]
        masses = np.exp(answer.logps[k][: len(ids)])
        assert (masses - truth[ids]).max() < 0.03  # what cannot be that much of the mass is not looked for
        assert (truth[ids] - masses - unknown).max() < 0.03
    settled = answer.unknown < 1e-9
    assert settled.mean() > exact
    assert case.differences()[settled].max() < 0.05


def test_a_number_that_goes_on_has_its_mass_where_the_teachers_token_could_have_ended() -> None:
    """The teacher has "ab", the student "a", "b". Behind an "a" that stayed alone, the teacher's own row holds no "b":
    with it the text would have been its "ab". What the student should expect there are both."""
    text = next(t for t in TEXTS if toys.encode(toys.bpe(MERGES["finer"][1]), t)[:1] == (1,) and len(t) == 1)
    case = Case("finer", top=100, texts=[text])
    answer = case.result.likeliest
    assert answer is not None and case.written.alignment.count_s.tolist() == [1, 1]
    own = np.exp(case.scores.top_logps[2])  # the teacher's row behind its "a"
    letters = [case.student.vocabulary.token(i).decode() for i in answer.ids[1].tolist() if i > 0]
    truth = case.truth(1)
    assert own[case.scores.top_ids[2] == toys.STOP] > 0.99 > 0.5 > truth[toys.STOP]
    assert set(letters) == set("abc") and case.differences()[1] < 1e-9


@pytest.mark.parametrize(("pair", "mean"), [("finer", 0.1), ("coarser", 0.03), ("overlapping", 0.03)])
def test_with_a_few_named_ids_it_stays_close_where_little_is_unknown(pair: str, mean: float) -> None:
    case = Case(pair, top=4)
    assert case.result.likeliest is not None
    assert case.differences()[case.result.likeliest.unknown < 0.1].mean() < mean


def test_behind_a_token_that_the_teacher_holds_impossible_nothing_is_known() -> None:
    case = Case("finer", top=100, texts=["acb"])
    logps, top = case.scores.logps.copy(), case.scores.top_logps
    assert case.scores.top_ids is not None and top is not None
    logps[1] = -np.inf
    top = top.copy()
    top[1, case.scores.top_ids[1] == case.reading.teacher_ids[1]] = -np.inf
    scores = TeacherScores(logps, case.scores.top_ids, top)
    answer = Projector(case.student, case.teacher).project(case.reading, scores).likeliest
    assert answer is not None
    assert answer.unknown[0] < 1.0 == answer.unknown[-1] == answer.residual[-1] and (answer.ids[-1] == -1).all()
