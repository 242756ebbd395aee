"""With a teacher whose distribution over texts is known, the target of every row is the exact one.

The teacher writes one of all texts of up to five letters with a known probability, always in its own tokens. So what a
student with the same distribution over texts, in its own tokens, expects next is a sum over texts. Three pairs of
tokenizers whose merges depend on what follows: the student's tokens are shorter, longer, or cut across the teacher's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import toys
from laboratory import MERGES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from diglot.batches import PairReader, align_pairs
from diglot.data import to_sample
from diglot.objectives import Pair, covering_ahead, covering_inner, covering_rows, covering_target, make_objective
from diglot.objectives.covering_cells import CellMap, Probes
from diglot.objectives.tail import TailTokens
from diglot.rendering import Renderer

SPACE = toys.Texts(length=5, prompts=("a",))
MASS = SPACE.random_distribution(5)[0]
TEXTS = [SPACE.strings[i] for i in np.random.default_rng(0).choice(len(MASS), 60, p=MASS / MASS.sum())]
Tokens = tuple[int, ...]
BYTES = "Ã©¨x"  # as a byte-level tokenizer names the bytes of "é", "è" and "x"
CHARACTERS = toys.Texts(letters="éèx", length=4, prompts=("é",))


class Known:
    """Distribution over the next token behind tokens, of one who writes all texts in its tokenizer's own tokens."""

    def __init__(self, tokenizer: Any, space: toys.Texts, mass: toys.Floats) -> None:
        self.paths, self.mass = [toys.encode(tokenizer, text) for text in space.strings], mass
        self.width, self.seen = len(tokenizer), dict[Tokens, Counter[int]]()

    def next(self, before: Tokens) -> Counter[int]:
        if before not in self.seen:
            masses: Counter[int] = Counter()
            for path, mass in zip(self.paths, self.mass, strict=True):
                if path[: len(before)] == before:
                    masses[path[len(before)] if len(path) > len(before) else toys.STOP] += mass
            total = sum(masses.values())
            self.seen[before] = Counter({i: m / total for i, m in masses.items()}) if total else Counter()
        return self.seen[before]

    def log_probs(self, before: Tokens) -> list[float]:
        row = self.next(before)
        return [float(np.log(max(row[i], 1e-300))) for i in range(self.width)]


class Case:
    """A pair of tokenizers, some texts, and what a perfect student expects at each of its tokens."""

    def __init__(
        self,
        merges: tuple[str, str],
        letters: str = "abc",
        space: toys.Texts = SPACE,
        mass: toys.Floats = MASS,
        texts: list[str] = TEXTS,
        **options: Any,
    ) -> None:
        student, teacher = (Renderer(toys.bpe(one, letters), name="toy") for one in merges)
        self.known_s, self.known_t = (Known(one.tokenizer, space, mass) for one in (student, teacher))
        reader = PairReader(student, teacher, same_vocabulary=False)
        prompt = space.prompts[0]
        reads = [reader.written(to_sample({"prompt": prompt, "completion": text}, where="test")) for text in texts]
        batch = align_pairs(reads, pad_s=student.stop_id, pad_t=teacher.stop_id, on_policy=False)
        self.written = batch.written
        sides = student.vocabulary, teacher.vocabulary, student.stop_ids, teacher.stop_ids
        made = Pair.of(*sides, student.encoder.spell, teacher.encoder.spell)
        self.objective: Any = make_objective("covering", made, **options)
        self.rows_read, self.texts = 0, list[Tokens]()  # hidden states are numbers of these
        t = self.written.teacher
        text = self.hidden([self.before(t, j) for j in range(len(t.ids))])
        scores: Any = SimpleNamespace(
            written=self.written, hidden_t=text, teacher_behind=self.behind, teacher_log_probs=self.log_probs
        )
        self.plan = self.objective.plan(self.written)
        self.targets = self.objective.targets(self.plan, scores)

    def before(self, side: Any, at: int) -> Tokens:
        return tuple(side.ids[np.flatnonzero(side.segment[:at] == side.segment[at])].tolist())

    def hidden(self, texts: list[Tokens]) -> torch.Tensor:
        self.texts += texts
        return torch.arange(len(self.texts) - len(texts), len(self.texts))[:, None]

    def behind(self, tail: TailTokens) -> torch.Tensor:
        branches = [tail.ids[e - int(tail.depth[e]) : e + 1].tolist() for e in range(len(tail.ids))]
        before = [self.before(self.written.teacher, one) for one in tail.before.tolist()]
        return self.hidden([(*one, *other) for one, other in zip(before, branches, strict=True)])

    def log_probs(self, hidden: torch.Tensor, ids: torch.Tensor | None = None) -> Iterator[tuple[slice, torch.Tensor]]:
        log_probs = [self.known_t.log_probs(self.texts[k]) for k in hidden[:, 0].tolist()]
        rows = torch.tensor(log_probs, dtype=torch.float64).reshape(len(log_probs), self.known_t.width)
        if ids is None:
            self.rows_read += len(rows)
            yield slice(0, len(rows)), rows
        else:
            yield slice(0, len(rows)), rows[:, ids].log_softmax(-1)

    def differences(self) -> np.ndarray:
        """Of each row, the total variation between its target and what a perfect student expects."""
        s, cells, distances = self.written.student, self.objective.cells.cell, []
        for r, i in enumerate(self.plan.student.tolist()):
            wanted, targets = self.known_s.next(self.before(s, i)), self.targets
            stop = wanted[toys.STOP]
            of_cells: Counter[int] = Counter()
            for token, mass in wanted.items():
                if token != toys.STOP:
                    of_cells[int(cells[token])] += mass
            gap = abs(stop - targets.stop[r])
            for column, mass in zip(targets.column[r].tolist(), targets.mass[r].tolist(), strict=True):
                if column >= 0:
                    gap += abs(of_cells.pop(column, 0.0) - mass)
            if targets.own[r] >= 0:
                gap = max(gap, 2 * abs(wanted[int(s.ids[i])] - targets.own_mass[r]))
            distances.append((gap + sum(of_cells.values())) / 2)
        return np.array(distances)


@pytest.mark.parametrize("pair", ["finer", "coarser", "overlapping"])
def test_looking_far_enough_gives_the_exact_distribution(pair: str, everything: None) -> None:
    """A perfect student has the very distribution that it is compared with, so its loss and its gradient are zero."""
    case = Case(MERGES[pair], top_k=10**6)
    assert len(case.plan.student) == len(case.written.student.ids)
    assert case.differences().max() < 1e-6


@pytest.mark.parametrize("teacher", ["Ã+© Ã+¨", "Ã+© Ã+¨ Ã©+Ã¨ x+Ã©", "Ã+© Ã©+x", "x+x"])
@pytest.mark.parametrize("student", ["", "Ã+¨"])
def test_a_student_that_cuts_inside_characters_is_taught_there_too(
    student: str, teacher: str, everything: None
) -> None:
    """Of "é" and "è", two bytes each with one in common, a side has both as tokens, one, or only their bytes."""
    mass = CHARACTERS.random_distribution(6)[0]
    texts = [CHARACTERS.strings[i] for i in np.random.default_rng(1).choice(len(mass), 60, p=mass / mass.sum())]
    case = Case((student, teacher), BYTES, CHARACTERS, mass, texts, top_k=10**6)
    assert len(case.plan.student) == len(case.written.student.ids) and case.plan.skipped == {"unreadable": 0}
    assert case.differences().max() < 1e-6


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """No threshold, and as far a look ahead as there is text."""
    monkeypatch.setattr(covering_ahead, "_LOOK", 0.0)
    monkeypatch.setattr(covering_ahead, "_SMALL", 0.0)
    monkeypatch.setattr(covering_ahead, "_PIECES", 8)
    monkeypatch.setattr(covering_inner, "_SOME", 1e-12)
    monkeypatch.setattr(covering_rows, "NEGLIGIBLE", 1e-12)
    monkeypatch.setattr(covering_target, "NEGLIGIBLE", 0.0)


@pytest.mark.parametrize(
    ("pair", "mean", "worst"), [("finer", 1e-3, 0.03), ("coarser", 0.01, 0.1), ("overlapping", 0.01, 0.1)]
)
def test_looking_only_where_it_matters_is_close(pair: str, mean: float, worst: float) -> None:
    case = Case(MERGES[pair])
    distances = case.differences()
    assert distances.mean() < mean and distances.max() < worst
    own = len(case.written.teacher.ids)
    assert case.rows_read - own < 3 * own


def test_a_place_is_given_up_by_a_few_columns_only_where_the_whole_row_would_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = Case(MERGES["overlapping"])
    monkeypatch.setattr(covering_inner, "_FREQUENT", 0)
    few = Case(MERGES["overlapping"])
    monkeypatch.setattr(covering_inner, "_at_most", lambda pairs, *_: np.zeros(len(pairs.to)))
    every = Case(MERGES["overlapping"])
    assert whole.rows_read <= few.rows_read <= every.rows_read and whole.rows_read < every.rows_read
    for case in (few, every):
        assert np.array_equal(case.targets.column, whole.targets.column)
        assert np.array_equal(case.targets.mass, whole.targets.mass)


def test_what_follows_is_asked_about_where_it_can_change_what_a_piece_means() -> None:
    """A tokenizer that leaves the last space to the word behind it reads two newlines as one token, or as two."""
    student, teacher = (_lines(regex) for regex in (True, False))
    cells = CellMap(student.vocabulary, teacher.vocabulary, student.encoder.spell, teacher.encoder.spell)
    probes = Probes(cells, student.encoder.spell, teacher.encoder.spell)
    pieces = [teacher.vocabulary.token(i) for i in range(len(teacher.vocabulary))]
    token, none = np.array([pieces.index(one) for one in (b"\n\n", b"the")]), np.zeros(2, dtype=np.int64)
    assert probes.open(token, none, cells.of_leaves(token, none)).tolist() == [True, False]


def _lines(regex: bool) -> Renderer:
    """Letters, a few words and lines; with `regex` cut into words before anything is merged, as GPT-2 does."""
    pieces = ["<stop>", *"ofthewrds", "Ġ", "Ċ", "ĊĊ", "of", "th", "the", "or", "Ġof"]
    merges = [("Ċ", "Ċ"), ("o", "f"), ("t", "h"), ("th", "e"), ("o", "r"), ("Ġ", "of")]
    made = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    made.decoder = decoders.ByteLevel()
    return Renderer(PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<stop>"), name="lines")
