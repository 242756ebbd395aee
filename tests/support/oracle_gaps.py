"""What each objective equals on toy models, and by how much what it does not equal is missed.

PYTHONPATH=src:tests python tests/support/oracle_gaps.py               # print every row
PYTHONPATH=src:tests python tests/support/oracle_gaps.py --markdown    # the table of docs/objectives.md
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from support.oracle import (
    Tokens,
    bpe_a,
    bpe_b,
    letters,
    noncanonical_mass,
    text_probability,
    unigram,
)
from support.oracle_chunks import between_breaks, chunks_of, mean_gap
from support.oracle_distributions import LAWS
from support.oracle_readings import (
    Claim,
    Learner,
    Reading,
    Row,
    canonical_pair,
    claims,
    fixed_pair,
    log_of,
    perfect_pair,
    random_pair,
    relative,
    turned,
)
from torch import Tensor

from diglot.batches.written import WrittenSide
from diglot.objectives import PathObjective, RowObjective, make_objective

OF_KL = "expected gradient = that of KL(path distribution || canonical teacher)"


# ---- span ------------------------------------------------------------------------------------------------------------


def span_totals(reading: Reading) -> Tensor:
    """What `span` at gamma 1 credits the first token of each path with, `[S]`: the sum over all chunks."""
    values, _ = make_objective("span", reading.pair)(reading.path, reading.batch.alignment)
    return values.metrics["advantage"][reading.first_s]


def span_sum_gap(reading: Reading) -> float:
    """Sum over chunks against `log q_canonical(text) - log p(path)`, largest difference in nats."""
    ratio = reading.teacher_logps() - reading.per_path(reading.path.logp_s)
    return float((span_totals(reading) - ratio).abs().max())


def span_bias(reading: Reading) -> Tensor:
    """Sum over chunks minus the true `log q(text) / p(text)`, in nats, `[S]`."""
    truth_t = log_of(text_probability(reading.teacher, text) for text in reading.texts)
    truth_s = log_of(text_probability(reading.student, text) for text in reading.texts)
    return span_totals(reading) - (truth_t - truth_s)


def span_gradient(reading: Reading, **options: Any) -> Tensor:
    """What the gradient of `span` is on average."""
    span = make_objective("span", reading.pair, **{"reward_clip": 1e6, **options})
    assert isinstance(span, PathObjective)
    return Learner(reading).expected_gradient(span)


def path_kl_gradient(reading: Reading) -> Tensor:
    """Gradient of KL(student's distribution of paths || teacher's canonical distribution of their text)."""
    teacher = reading.teacher_logps()
    return Learner(reading).expectation_gradient(lambda logp: logp - teacher)


def whole_credit(reading: Reading) -> Tensor:
    """Every token credited with `log q_canonical(text) - log p(path)`, `[N_s]`."""
    return reading.per_token(reading.teacher_logps() - reading.per_path(reading.path.logp_s))


def settled_credit(reading: Reading) -> Tensor:
    """Credit of each token from the last teacher boundary before it that no later text can move, `[N_s]`.

    The teacher's terms before that boundary are the same whatever this token is, so they may be dropped; what `span`
    drops, all that is before the token's own chunk, can be other for another token, which may have made another chunk.
    """
    written, fixed = reading.batch.written, _settled_boundaries(reading)
    from_s, from_t = (_from_here(logp, side) for logp, side in _sides(reading))
    credit = []
    for k, tokens in enumerate(reading.tokens):
        start_t = np.where(written.teacher.segment == k, written.teacher.start, -1)
        for i in range(len(tokens) + 1):
            token_t = int(np.flatnonzero(start_t == max(fixed[tokens[:i]]))[0])
            credit.append(from_t[token_t] - from_s[int(reading.first_s[k]) + i])
    return torch.stack(credit)


def _settled_boundaries(reading: Reading) -> dict[Tokens, set[int]]:
    """Teacher boundaries before the next token, for each beginning of a path: those that all its continuations have."""
    teacher = reading.batch.written.teacher
    fixed: dict[Tokens, set[int]] = {}
    for k, tokens in enumerate(reading.tokens):
        ends = {0, *teacher.end[teacher.segment == k].tolist()}
        for i in range(len(tokens) + 1):
            start = len(reading.student.toy.spell(tokens[:i]))
            fixed[tokens[:i]] = fixed.get(tokens[:i], ends) & {end for end in ends if end <= start}
    return fixed


def _sides(reading: Reading) -> list[tuple[Tensor, WrittenSide]]:
    written = reading.batch.written
    return [(reading.path.logp_s, written.student), (reading.path.logp_t, written.teacher)]


def _from_here(logp: Tensor, side: WrittenSide) -> Tensor:
    """Log-probability of each token and all after it in its segment, `[N]`."""
    total = logp.cumsum(0)
    last = np.searchsorted(side.segment, side.segment, side="right") - 1
    return total[last] - total + logp


def span_rows() -> list[Row]:
    rows = []
    for student, teacher in ((bpe_a, bpe_b), (bpe_b, bpe_a), (bpe_a, unigram)):
        claim = claims("span", f"{student.__name__} <- {teacher.__name__}")
        sampled, perfect = random_pair(student, teacher), perfect_pair(student, teacher)
        rows += _span_sum_rows(claim, canonical_pair(student, teacher), sampled, perfect)
        rows += _span_gradient_rows(claim, sampled, perfect)
    claim, reading = claims("span", "bpe_a <- letters, whose tokens end at every byte"), random_pair(bpe_a, letters)
    gap = relative(span_gradient(reading), path_kl_gradient(reading))
    return [
        *rows,
        claim(OF_KL, "exact", gap, "relative norm"),
    ]


def _span_sum_rows(claim: Claim, canonical: Reading, sampled: Reading, perfect: Reading) -> list[Row]:
    bias = span_bias(canonical)
    exact = max(span_sum_gap(canonical), span_sum_gap(sampled))
    absolute, signed = float((canonical.mass * bias.abs()).sum()), float((canonical.mass * bias).sum())
    others = noncanonical_mass(sampled.student)
    return [
        claim("sum over chunks = log q_canonical(text) - log p(path)", "exact", exact, "nats, max"),
        claim("sum over chunks = log q(text) / p(text)", "approximate", absolute, "nats per text, mean |difference|"),
        claim("sum over chunks = log q(text) / p(text), signed", "approximate", signed, "nats per text, mean"),
        claim("a perfect student: sum over chunks = 0", "exact", float(span_totals(perfect).abs().max()), "nats, max"),
        claim("a random student writes canonical paths", "approximate", others, "probability of others"),
    ]


def _span_gradient_rows(claim: Claim, sampled: Reading, perfect: Reading) -> list[Row]:
    gradient, wanted, learner = span_gradient(sampled), path_kl_gradient(sampled), Learner(sampled)
    whole = learner.credited_gradient(whole_credit(sampled))
    settled = learner.credited_gradient(settled_credit(sampled))
    drift, still = (float(span_gradient(perfect, credit=c).norm()) for c in ("variance_reduced", "whole"))
    by_option = relative(span_gradient(sampled, credit="whole"), wanted)
    return [
        claim(OF_KL, "approximate", relative(gradient, wanted), "relative norm"),
        claim(f"{OF_KL}, direction", "approximate", turned(gradient, wanted), "1 - cosine"),
        claim(f"{OF_KL}, whole text credited", "exact", relative(whole, wanted), "relative norm"),
        claim(f"{OF_KL}, credit=whole", "exact", by_option, "relative norm"),
        claim(f"{OF_KL}, settled past dropped", "exact", relative(settled, wanted), "relative norm"),
        claim("a perfect student: expected gradient = 0", "approximate", drift, "nats, norm over all logits"),
        claim("a perfect student: expected gradient = 0, credit=whole", "exact", still, "nats, norm over all logits"),
        *_noncanonical_rows(claim, sampled),
    ]


def text_kl_gradient(reading: Reading) -> Tensor:
    """Gradient of KL(student's distribution of texts || teacher's distribution of texts), each summed over all
    tokenizations."""
    truth_t = log_of(text_probability(reading.teacher, text) for text in reading.texts)
    truth_s = log_of(text_probability(reading.student, text) for text in reading.texts)
    return Learner(reading).credited_gradient(reading.per_token(truth_t - truth_s))


def _noncanonical_rows(claim: Claim, sampled: Reading) -> list[Row]:
    """What each answer to tokens that the student's tokenizer would not write does to the direction of the gradient."""
    wanted = text_kl_gradient(sampled)
    of_text = "expected gradient points along that of KL(text distribution || text distribution)"
    return [
        claim(f"{of_text}, noncanonical={option}, credit={credit}", "approximate",
              turned(span_gradient(sampled, noncanonical=option, credit=credit), wanted), "1 - cosine")
        for credit in ("variance_reduced", "whole")
        for option in ("none", "mask", "boundary")
    ]  # fmt: skip


# ---- sequence_kl -----------------------------------------------------------------------------------------------------


def normalised_gap(reading: Reading, logp: Tensor) -> Tensor:
    """`log p(path) / tokens - log q_canonical(text) / tokens of the teacher`, stop counted, `[S]`."""
    tokens_t = torch.tensor([len(reading.teacher.toy.canonical(text)) + 1 for text in reading.texts])
    return logp / reading.lengths - reading.teacher_logps() / tokens_t


def sequence_gradient(reading: Reading) -> Tensor:
    """What the gradient of `sequence_kl` is on average."""
    sequence_kl = make_objective("sequence_kl", reading.pair)
    assert isinstance(sequence_kl, PathObjective)
    return Learner(reading).expected_gradient(sequence_kl)


def sequence_rows() -> list[Row]:
    rows = []
    for student, teacher in ((bpe_a, bpe_b), (bpe_a, unigram)):
        claim = claims("sequence_kl", f"{student.__name__} <- {teacher.__name__}")
        reading, fixed, perfect = (make(student, teacher) for make in (random_pair, fixed_pair, perfect_pair))
        gradient, learner = sequence_gradient(reading), Learner(reading)
        cost = (normalised_gap(reading, reading.per_path(reading.path.logp_s)) / reading.lengths).detach()
        normalised = learner.expectation_gradient(lambda logp, r=reading: normalised_gap(r, logp))
        of_fixed = Learner(fixed).expectation_gradient(lambda logp, r=fixed: normalised_gap(r, logp)) / fixed.lengths[0]
        values, _ = make_objective("sequence_kl", perfect.pair)(perfect.path, perfect.batch.alignment)
        rows += [
            claim("expected gradient = that of E[gap / tokens], each text's gap / tokens a constant", "exact",
                  relative(gradient, learner.expectation_gradient(lambda logp, c=cost: c)), "relative norm"),
            claim("paths of equal length: expected gradient = that of E[gap], over the number of tokens", "exact",
                  relative(sequence_gradient(fixed), of_fixed), "relative norm"),
            claim("expected gradient points along that of E[gap]", "approximate",
                  turned(gradient, normalised), "1 - cosine"),
            claim("expected gradient points along that of KL(path distribution || canonical teacher)", "approximate",
                  turned(gradient, path_kl_gradient(reading)), "1 - cosine"),
            claim("a perfect student: loss = 0", "approximate", float((perfect.mass * values.loss).sum()),
                  "nats^2 per text, mean"),
            claim("a perfect student: expected gradient = 0", "approximate",
                  float(sequence_gradient(perfect).norm()), "norm over all logits"),
        ]  # fmt: skip
    return rows


# ---- strict ----------------------------------------------------------------------------------------------------------


def strict_rows() -> list[Row]:
    """Beta is one half: each side gives nothing to tokens that the other does write, so a KL would be infinite."""
    rows = []
    for student, teacher in ((bpe_a, bpe_b), (bpe_a, unigram)):
        claim, perfect = claims("strict", f"{student.__name__} <- {teacher.__name__}"), perfect_pair(student, teacher)
        for residual in (False, True):
            loss, weight = row_losses(perfect, "strict", top_k=None, beta=0.5, residual=residual)
            rows.append(
                claim(f"a perfect student: loss = 0 (residual={residual})", "approximate",
                      float((weight * loss).sum() / weight.sum()), "nats per row, mean")
            )  # fmt: skip
    return rows


def row_losses(reading: Reading, name: str, **options: Any) -> tuple[Tensor, Tensor]:
    """Values of a row objective on a reading, and the student's probability of each row's path, `[R]` each."""
    objective = make_objective(name, reading.pair, **options)
    assert isinstance(objective, RowObjective)
    rows = objective.rows(reading.batch.written)
    values = objective(reading.rows_s[rows.student], reading.rows_t[rows.teacher], **rows.inputs)
    return values.loss, reading.mass[reading.segment_s[rows.student]]


# ---- alm: chunks as events -------------------------------------------------------------------------------------------


def alm_rows() -> list[Row]:
    """What an objective on chunk probabilities is given, against the probability of the same bytes."""
    rows = []
    for student, teacher in ((bpe_a, bpe_b), (bpe_a, unigram), (bpe_b, bpe_a)):
        claim = claims("alm", f"{student.__name__} <- {teacher.__name__}")
        cut_at_breaks = teacher is not bpe_a  # no token of the teacher's holds a letter and then a space
        rows += _chunk_rows(claim, "random models", canonical_pair(student, teacher))
        rows += _chunk_rows(claim, "perfect models", perfect_pair(student, teacher))
        rows += _perfect_chunk_rows(claim, perfect_pair(student, teacher), cut_at_breaks)
    return rows


def _chunk_rows(claim: Claim, who: str, reading: Reading) -> list[Row]:
    t, unit = chunks_of(reading, student=False), "nats per chunk, mean |difference|"
    plain, outcome = t.logp - t.true, t.logp + t.break_after - t.true_break
    return [
        claim(f"{who}: P(chunk) = P(its bytes)", "approximate", mean_gap(reading, plain), unit),
        claim(f"{who}: P(chunk, break) = P(its bytes, then a break)", "approximate", mean_gap(reading, outcome), unit),
    ]


def _perfect_chunk_rows(claim: Claim, reading: Reading, cut_at_breaks: bool) -> list[Row]:
    s, t, unit = (
        chunks_of(reading, student=True),
        chunks_of(reading, student=False),
        "nats per chunk, mean |difference|",
    )
    outcome = t.logp + t.break_after - s.logp - s.break_after
    between, gap = t.logp + t.break_after - t.break_before - t.true_between, between_breaks(reading)
    kind = "exact" if cut_at_breaks else "approximate"
    return [
        claim("a perfect student: both sides' P(chunk) agree", "approximate", mean_gap(reading, t.logp - s.logp), unit),
        claim("a perfect student: both sides' P(chunk, break) agree", "approximate", mean_gap(reading, outcome), unit),
        claim("perfect models, chunks between breaks: P(chunk, break) = P(its bytes, then a break)", "approximate",
              mean_gap(reading, t.logp + t.break_after - t.true_break, gap), unit),
        claim("perfect models, chunks between breaks: P(chunk, break | break before) = the same of its bytes", kind,
              mean_gap(reading, between, gap), unit),
    ]  # fmt: skip


# ---- the table -------------------------------------------------------------------------------------------------------


TABLE: list[Callable[[], list[Row]]] = [span_rows, sequence_rows, strict_rows, alm_rows, *LAWS]
"""One function per objective; an objective joins the table by adding its own."""


def gap_table() -> list[Row]:
    """All claims with their measured gaps: {objective, claim, kind, gap, unit}."""
    return [one for rows in TABLE for one in rows()]


def markdown(rows: list[Row]) -> str:
    """The claims of each objective with the range of their gaps over the pairs, as the documentation shows them."""
    grouped: dict[tuple[str, str, str, bool], list[Row]] = {}
    for one in rows:
        claim = one["claim"].split(": ", 1)[1]
        exact = one["kind"] != "approximate"
        grouped.setdefault((one["objective"], claim, one["unit"], exact), []).append(one)
    lines = ["| objective | claim | measured gap | unit |", "|---|---|---|---|"]
    for (objective, claim, unit, exact), result in grouped.items():
        gaps = sorted(one["gap"] for one in result)
        low, high = (f"{gap:.2g}" for gap in (gaps[0], gaps[-1]))
        bound = "1e-10" if gaps[-1] < 1e-10 else "1e-7"
        gap = f"exact (< {bound})" if exact else low if low == high else f"{low} to {high}"
        row = f"| `{objective}` | {_escaped(claim)} | {gap} | {_escaped(unit)} |"
        lines.append(row)
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def show(rows: list[Row]) -> None:
    """Print a table."""
    for one in rows:
        print(f"{one['objective']:13} {one['kind']:12} {one['gap']:10.2e} {one['unit']:38} {one['claim']}")


if __name__ == "__main__":
    print(markdown(gap_table())) if "--markdown" in sys.argv else show(gap_table())
