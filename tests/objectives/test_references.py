"""Objectives against the same written plainly, row by row and token by token, from the formula."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import pytest
import torch
from support.scored import TEXTS, Scored
from torch import Tensor

from diglot.objectives import make_objective
from diglot.vocabulary import Vocabulary

SIDES = [("chatml", "turns"), ("inst", "chatml"), ("unigram", "inst"), ("turns", "nfc")]
Distribution = dict[Any, float]


def pieces(vocabulary: Vocabulary) -> dict[bytes, int]:
    """Bytes -> id; the smallest of several."""
    ids: dict[bytes, int] = {}
    for i in range(len(vocabulary)):
        if vocabulary.lengths[i]:
            ids.setdefault(vocabulary.token(i), i)
    return ids


def longest(table: dict[bytes, int], text: bytes) -> int | None:
    return next((table[text[:k]] for k in range(len(text), 0, -1) if text[:k] in table), None)


def jsd(t: Distribution, s: Distribution, beta: float, floor: float = 0.0) -> float:
    """As the papers write it, over the union of the cells."""
    cells = sorted({*t, *s}, key=str)
    q, p = ([distribution.get(c, 0.0) for c in cells] for distribution in (t, s))
    if beta == 0:
        return sum(a * math.log(a / b) for a, b in zip(q, p, strict=True) if a > 0)
    q = [max(a, floor) if b > 0 else a for a, b in zip(q, p, strict=True)]
    if beta == 1:
        return sum(b * math.log(b / a) for a, b in zip(q, p, strict=True) if b > 0)
    m = [beta * a + (1 - beta) * b for a, b in zip(q, p, strict=True)]
    of_t = sum(a * math.log(a / c) for a, c in zip(q, m, strict=True) if a > 0)
    of_s = sum(b * math.log(b / c) for b, c in zip(p, m, strict=True) if b > 0)
    return beta * of_t + (1 - beta) * of_s


class Plain:
    """Everything about a scored batch as Python objects."""

    def __init__(self, scored: Scored) -> None:
        self.written, self.pair = scored.batch.written, scored.pair
        tables = scored.pair.need_tables("test")
        self.vs, self.vt = tables.student, tables.teacher
        self.by_bytes_s, self.by_bytes_t = pieces(self.vs), pieces(self.vt)
        self.p, self.q = (x.detach().softmax(-1).tolist() for x in (scored.logits_s, scored.logits_t))
        self.stop_s, self.stop_t = set(self.pair.stop_s.tolist()), set(self.pair.stop_t.tolist())
        self.texts_t = [self.vt.token(u) for u in range(len(self.vt))]

    # ---- the byte-prefix marginal ------------------------------------------------------------------------------

    def marginal(self, i: int) -> tuple[Distribution, set[Any]]:
        """Target of student row `i`, and the cells that some teacher token maps to."""
        s, t = self.written.student, self.written.teacher
        j = max(k for k in range(len(t.ids)) if t.segment[k] == s.segment[i] and t.start[k] <= s.start[i])
        done = int(s.start[i] - t.start[j])
        prefix = self.texts_t[t.ids[j]][:done]
        target: Distribution = defaultdict(float)
        cells: set[Any] = set()
        for u, mass in enumerate(self.q[j]):
            text = self.texts_t[u]
            if done and (not text.startswith(prefix) or len(text) == done):
                continue
            v = "stop" if u in self.stop_t and not done else longest(self.by_bytes_s, text[done:]) if text else None
            target[v] += mass
            cells.add(v)
        self._spans(i, j, done, target)
        total = sum(target.values())
        return {v: mass / total for v, mass in target.items() if mass > 0}, cells | {v for v in target if target[v] > 0}

    def _spans(self, i: int, j: int, done: int, target: Distribution) -> None:
        """Move mass to student tokens along the written text that end after teacher token `j`."""
        s, t = self.written.student, self.written.teacher
        if s.stop[i]:
            return
        text = self.written.texts[s.segment[i]]
        start, own_end = int(s.start[i]), min(int(s.end[i]), len(text))
        head = longest(self.by_bytes_s, self.texts_t[t.ids[j]][done:])
        moved_from = head
        for end in range(start + 1, own_end + 1):
            v = self.by_bytes_s.get(text[start:end])
            if v is None or end <= t.end[j]:
                continue
            mass, k = 1.0, j
            while t.end[k] < end:
                mass *= self.q[k][t.ids[k]]
                k += 1
            rest = text[int(t.start[k]) : end]
            mass *= sum(q for u, q in enumerate(self.q[k]) if self.texts_t[u].startswith(rest))
            target[moved_from] = (
                max(target[moved_from] - mass, 0.0) if moved_from is head else target[moved_from] - mass
            )
            target[v] += mass
            moved_from = v

    def student(self, i: int, cells: set[Any]) -> Distribution:
        distribution: Distribution = defaultdict(float)
        for v, mass in enumerate(self.p[i]):
            cell: Any = "stop" if v in self.stop_s else v
            distribution[cell if cell in cells or cell == "stop" else None] += mass
        return distribution


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("sides", SIDES, ids="-".join)
def test_bpm_is_the_marginal_written_plainly(sides: tuple[str, str], beta: float) -> None:
    scored = Scored.of(*sides, TEXTS[:3])
    objective = make_objective("bpm", scored.pair, beta=beta)
    rows, plain = objective.rows(scored.batch.written), Plain(scored)  # type: ignore[union-attr]
    expected = []
    for i in rows.student.tolist():
        target, cells = plain.marginal(i)
        expected.append(jsd(target, plain.student(i, cells), beta, floor=1e-8))
    assert rows.skipped["blank"] >= 1 or sides[0] == "unigram"
    losses = scored.of_objective(objective).loss
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("sides", SIDES, ids="-".join)
def test_shared_prefix_is_the_jsd_of_the_cells_written_plainly(sides: tuple[str, str], beta: float) -> None:
    scored = Scored.of(*sides, TEXTS[:3])
    plain, written = Plain(scored), scored.batch.written
    rows = [
        (i, j)
        for i in range(len(written.student.ids))
        for j in range(len(written.teacher.ids))
        if written.student.segment[i] == written.teacher.segment[j]
        and written.student.start[i] == written.teacher.start[j]
        and written.usable_s[i]
        and written.usable_t[j]
    ]
    shared = plain.by_bytes_s.keys() & plain.by_bytes_t.keys()

    def cell(text: bytes) -> Any:
        fitting = [text[:k] for k in range(len(text), 0, -1) if text[:k] in shared]
        return "rest" if not text else fitting[0] if fitting else text[0]

    on_both = {cell(t) for t in plain.by_bytes_s} & {cell(t) for t in plain.by_bytes_t}

    def distribution(vocabulary: Vocabulary, probs: list[float], stop: set[int]) -> Distribution:
        cells: Distribution = defaultdict(float)
        for i, mass in enumerate(probs):
            own = cell(vocabulary.token(i))
            cells["stop" if i in stop else own if own in on_both else "rest"] += mass
        return cells

    expected = [
        jsd(distribution(plain.vt, plain.q[j], plain.stop_t), distribution(plain.vs, plain.p[i], plain.stop_s), beta)
        for i, j in rows
    ]
    losses = scored.values("shared_prefix", beta=beta).loss
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-9)


class PlainBytes:
    """Next-byte distributions of one side, byte by byte."""

    def __init__(self, vocabulary: Vocabulary, side: Any, probs: list[list[float]], stop: set[int]) -> None:
        self.texts, self.side, self.probs, self.stop = (
            [vocabulary.token(i) for i in range(len(vocabulary))],
            side,
            probs,
            stop,
        )

    def under_way(self, i: int, read: int) -> tuple[dict[int, float], float]:
        """Masses of the byte after the first `read` of token `i`, and of "it ends here"."""
        prefix, masses, ended = self.texts[self.side.ids[i]][:read], defaultdict(float), 0.0
        for u, mass in enumerate(self.probs[i]):
            text = self.texts[u]
            if read == 0 and u in self.stop:
                masses[256] += mass
            elif text.startswith(prefix) and len(text) > read:
                masses[text[read]] += mass
            elif text and text == prefix:
                ended += mass
        return dict(masses), ended

    def distribution(self, i: int, read: int) -> tuple[Distribution, float]:
        """Distribution of the byte after the first `read` of token `i`, and the surprisal of the cut there."""
        masses, ended = self.under_way(i, read)
        total = sum(masses.values())
        own = {b: m / total for b, m in masses.items()}
        if read:
            return own, -math.log(total / (total + ended))
        before = i - 1
        if before < 0 or self.side.segment[before] != self.side.segment[i]:
            return own, 0.0
        masses, ended = self.under_way(before, int(self.side.end[before] - self.side.start[before]))
        total = sum(masses.values()) + ended
        mixed = {b: (ended * own.get(b, 0.0) + masses.get(b, 0.0)) / total for b in {*own, *masses}}
        return mixed, -math.log(ended / total)


@pytest.mark.parametrize(("beta", "anchor"), [(0.0, 0.0), (0.5, 1.0), (1.0, 0.25)])
@pytest.mark.parametrize("sides", SIDES[:2], ids="-".join)
def test_byte_is_the_jsd_of_next_byte_distributions_written_plainly(
    sides: tuple[str, str], beta: float, anchor: float
) -> None:
    scored = Scored.of(*sides, TEXTS[:2])
    plain, written = Plain(scored), scored.batch.written
    both = (
        PlainBytes(plain.vs, written.student, plain.p, plain.stop_s),
        PlainBytes(plain.vt, written.teacher, plain.q, plain.stop_t),
    )
    expected = []
    for segment, text in enumerate(written.texts):
        for n in range(len(text) + 1):
            distributions = []
            for side in both:
                tokens = zip(side.side.segment, side.side.start, side.side.end, strict=True)
                i = next(k for k, (seg, a, b) in enumerate(tokens) if seg == segment and a <= n < b)
                distributions.append(side.distribution(i, n - int(side.side.start[i])))
            (distribution_s, cut), (distribution_t, _) = distributions
            smooth = [
                {b: (distribution.get(b, 0.0) + 1e-8) / (1 + 257e-8) for b in range(257)}
                for distribution in (distribution_s, distribution_t)
            ]
            expected.append(jsd(smooth[1], smooth[0], beta) + anchor * cut)
    losses = scored.values("byte", beta=beta, anchor=anchor).loss
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-9)


def test_the_byte_distributions_given_the_cut_and_the_cut_itself_make_up_the_surprisal_of_the_tokens() -> None:
    """The anchor is exactly that part of cross-entropy that says nothing about content."""
    scored = Scored.of("chatml", "inst", TEXTS[:2])
    plain, s = Plain(scored), scored.batch.written.student
    side = PlainBytes(plain.vs, s, plain.p, plain.stop_s)
    cut = float(scored.values("byte").metrics["cut_s"].sum())
    content, controls = 0.0, 0.0
    for i in range(len(s.ids)):
        for read in range(1 if s.stop[i] else int(s.end[i] - s.start[i])):
            masses, _ = side.under_way(i, read)
            b = 256 if s.stop[i] else side.texts[s.ids[i]][read]
            content -= math.log(masses[b] / sum(masses.values()))
            controls -= math.log(sum(masses.values())) if read == 0 else 0.0
    surprisal = -float(scored.path.logp_s.detach().sum())
    # Left over: mass on control tokens at each row, and the cut of each segment's last token when it has no stop.
    assert surprisal == pytest.approx(content + controls + cut, rel=1e-9)


def test_escd_adds_the_completions_written_plainly() -> None:
    scored = Scored.of("inst", "chatml", TEXTS[:3])
    plain, s = Plain(scored), scored.batch.written.student
    objective: Any = make_objective("escd", scored.pair)
    rows = objective.rows(scored.batch.written)
    split: dict[int, dict[bytes, list[int]]] = defaultdict(lambda: defaultdict(list))  # first piece -> group -> tokens
    whole = {text: longest(plain.by_bytes_s, text) for text in plain.by_bytes_t}
    for text, piece in whole.items():
        assert piece is not None
        if text not in plain.by_bytes_s:
            heads = [text[:k] for k in range(1, len(text) + 1)]
            head = next(h for h in heads if h in whole and h not in plain.by_bytes_s and whole[h] == piece)
            split[piece][head].append(plain.by_bytes_t[text])
    expected = []
    for i, j in list(zip(rows.student.tolist(), rows.teacher.tolist(), strict=True))[rows.items :]:
        piece, total = int(s.ids[i - 1]), 0.0
        for head, members in split[piece].items():
            rest = head[len(plain.vs.token(piece)) :]
            completed = sum(p for v, p in enumerate(plain.p[i]) if plain.vs.token(v).startswith(rest) and rest)
            if completed > 0:
                total -= sum(plain.q[j][u] for u in members) * math.log(completed)
        expected.append(total)
    losses = scored.of_objective(objective).loss
    torch.testing.assert_close(losses[: rows.items], scored.values("bpm").loss)
    torch.testing.assert_close(losses[rows.items :], torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-9)
    assert len(expected) > 5 and sum(expected) > 0


@pytest.mark.parametrize(
    ("name", "options"),
    [("bpm", {}), ("bpm", {"beta": 1.0}), ("shared_prefix", {}), ("escd", {"beta": 0.5}), ("byte", {})],
)
def test_the_gradient_is_the_derivative(name: str, options: dict[str, Any]) -> None:
    scored = Scored.of("chatml", "inst", ["a bc"], spread=1.0)
    objective = make_objective(name, scored.pair, **options)
    columns = scored.logits_s.shape[1]

    def value(moved: Tensor) -> Tensor:
        # A few directions of the logits are enough: all 420 columns of every row would take minutes.
        scored.logits_s = base + moved @ directions
        return scored.of_objective(objective).loss

    base = scored.logits_s.detach()
    directions = torch.randn(4, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = torch.zeros(len(base), 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(value, (start,), atol=1e-6)
