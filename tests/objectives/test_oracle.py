"""The oracle is the truth about text, and objectives are to it what is said of them; planted faults are found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import support.oracle_gaps as gaps
import support.oracle_readings as readings
import torch
from support import oracle
from support.oracle import (
    ALPHABET,
    STOP,
    TOYS,
    Answers,
    Distribution,
    InducedDistribution,
    RandomDistribution,
    Toy,
    bpe_a,
    bpe_b,
    letters,
    unigram,
)
from support.oracle_chunks import between_breaks, chunks_of, mean_gap

PAIRS = [(bpe_a, bpe_b), (bpe_b, bpe_a), (bpe_a, unigram)]
ROUNDING = 1e-12
FAULT = 1e-3  # every planted fault is at least so large


def random_distribution(toy: Callable[[], Toy] = bpe_a, limit: int = 4) -> RandomDistribution:
    return RandomDistribution(toy(), limit, seed=1)


def induced_distribution(toy: Callable[[], Toy] = bpe_a) -> InducedDistribution:
    return InducedDistribution(toy(), oracle.text_distribution(RandomDistribution(letters(), 4, seed=3)))


# ---- the oracle ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [random_distribution, induced_distribution])
@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
def test_answers_about_text_agree_with_enumeration_and_each_other(toy: Callable[[], Toy], make: Any) -> None:
    assert max(oracle.errors(make(toy)).values()) < ROUNDING


@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
def test_toys_are_small_and_spell_every_text_over_their_letters(toy: Callable[[], Toy]) -> None:
    assert len(toy().pieces) <= 40
    for text in oracle.text_distribution(random_distribution(letters)):
        assert toy().spell(toy().canonical(text)) == text


def test_the_toys_cut_the_same_text_differently() -> None:
    cuts = {tuple(t.pieces[i] for i in t.canonical(b"abc ab bca")) for t in (make() for make in TOYS.values())}
    assert len(cuts) == len(TOYS)


def test_chain_rule_holds_on_texts_too_many_to_enumerate() -> None:
    """Twelve bytes: next-byte distributions, stop included, multiply to the probability of the text."""
    distribution = random_distribution(unigram, limit=12)
    for text in (b"abca bab aab", b"cab bc", b"   ", b""):
        chain = [oracle.next_byte_distribution(distribution, text[:i])[b] for i, b in enumerate((*text, STOP))]
        assert np.log(chain).sum() == pytest.approx(np.log(oracle.text_probability(distribution, text)), abs=1e-10)


def test_no_text_is_longer_than_the_limit_and_none_has_other_letters() -> None:
    distribution = random_distribution(bpe_b)
    assert oracle.text_probability(distribution, b"abcab") == oracle.cylinder(distribution, b"abcab") == 0
    assert set(np.flatnonzero(oracle.next_byte_distribution(distribution, b"ab"))) == {*ALPHABET, STOP}
    assert oracle.next_byte_distribution(distribution, b"abca")[STOP] == pytest.approx(1)


def test_tokenisations_given_a_text_are_all_of_them_and_sum_to_one() -> None:
    distribution = random_distribution()
    probabilities = oracle.tokenisations(distribution, b"abca")
    cuts = {tuple(distribution.toy.pieces[i] for i in tokens) for tokens in probabilities}
    assert cuts == {
        tuple(part.encode() for part in cut.split("|")) for cut in ("a|b|c|a", "ab|c|a", "abc|a", "a|b|ca", "ab|ca")
    }
    assert sum(probabilities.values()) == pytest.approx(1)
    share = oracle.canonical_probability(distribution, b"abca") / oracle.text_probability(distribution, b"abca")
    assert probabilities[distribution.toy.canonical(b"abca")] == pytest.approx(share)


def test_an_induced_distribution_has_the_text_distribution_that_it_was_made_of_and_never_leaves_canonical_paths() -> (
    None
):
    texts = oracle.text_distribution(RandomDistribution(letters(), 4, seed=3))
    for toy in (bpe_a, bpe_b, unigram):
        distribution = induced_distribution(toy)
        assert oracle.text_distribution(distribution) == pytest.approx(texts, abs=ROUNDING)
        assert oracle.noncanonical_mass(distribution) == 0
        prefix = b"bc"
        assert oracle.next_byte_distribution(distribution, prefix) == pytest.approx(
            oracle.next_byte_distribution(induced_distribution(letters), prefix)
        )


def test_noncanonical_mass_is_what_canonical_paths_leave() -> None:
    distribution = random_distribution()
    canonical = sum(oracle.canonical_probability(distribution, text) for text in oracle.text_distribution(distribution))
    assert oracle.noncanonical_mass(distribution) == pytest.approx(1 - canonical)
    assert 0.05 < oracle.noncanonical_mass(distribution) < 0.95
    assert oracle.noncanonical_mass(random_distribution(letters)) == 0


# ---- planted faults --------------------------------------------------------------------------------------------------


def _without_stop(distribution: Distribution, prefix: bytes) -> np.ndarray:
    masses = oracle.next_byte_distribution(distribution, prefix)
    masses[STOP] = 0
    return masses


def _stop_shared_out(distribution: Distribution, prefix: bytes) -> np.ndarray:
    masses = _without_stop(distribution, prefix)
    return masses / masses.sum() if masses.sum() else masses


def _one_byte_late(distribution: Distribution, prefix: bytes) -> np.ndarray:
    return oracle.next_byte_distribution(distribution, prefix[:-1])


def _next_token_only(distribution: Distribution, prefix: bytes) -> np.ndarray:
    """Tokens that run past the end of the prefix are forgotten."""
    ending, _ = oracle.cover(distribution, prefix)
    masses = np.zeros(STOP + 1)
    for state, mass in ending.items():
        for v, p in enumerate(distribution.row(state)):
            masses[STOP if v == distribution.toy.stop else distribution.toy.pieces[v][0] if p else 0] += mass * p
    return masses / masses.sum() if masses.sum() else masses


def _canonical_rows(distribution: Distribution, prefix: bytes) -> np.ndarray:
    """The row after the canonical path of the prefix alone, read as bytes: what a model says if nobody looks back."""
    row = distribution.row(oracle.states(distribution, distribution.toy.canonical(prefix))[-1])
    masses = np.zeros(STOP + 1)
    for v in np.flatnonzero(row):
        masses[STOP if v == distribution.toy.stop else distribution.toy.pieces[v][0]] += row[v]
    return masses


def _ending_only(distribution: Distribution, prefix: bytes) -> float:
    return sum(oracle.cover(distribution, prefix)[0].values())


def _without_last_byte(distribution: Distribution, prefix: bytes) -> float:
    return oracle.cylinder(distribution, prefix[:-1])


def _unstopped(distribution: Distribution, text: bytes) -> float:
    return _ending_only(distribution, text)


@pytest.mark.parametrize(
    ("fault", "failing"),
    [
        ({"text_probability": oracle.canonical_probability}, {"mass", "texts", "chain"}),
        ({"text_probability": _unstopped}, {"mass", "texts", "chain"}),
        ({"text_probability": oracle.cylinder}, {"mass", "texts", "chain"}),
        ({"cylinder": _ending_only}, {"cylinders"}),
        ({"cylinder": _without_last_byte}, {"cylinders"}),
        ({"next_byte_distribution": _without_stop}, {"distributions", "chain"}),
        ({"next_byte_distribution": _stop_shared_out}, {"chain"}),
        ({"next_byte_distribution": _one_byte_late}, {"chain"}),
        ({"next_byte_distribution": _next_token_only}, {"chain"}),
        ({"next_byte_distribution": _canonical_rows}, {"chain"}),
    ],
)
def test_a_planted_fault_is_found(fault: dict[str, Any], failing: set[str]) -> None:
    errors = oracle.errors(random_distribution(), replace(Answers(), **fault))
    assert {name for name, error in errors.items() if error > FAULT} >= failing
    untouched = {"mass", "texts", "cylinders", "distributions", "chain"} - failing - {"distributions"}
    assert all(errors[name] < ROUNDING for name in untouched)


# ---- objectives against the truth ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_span_sums_to_the_log_ratio_of_paths_not_of_texts(student: Any, teacher: Any) -> None:
    canonical, sampled = readings.canonical_pair(student, teacher), readings.random_pair(student, teacher)
    assert gaps.span_sum_gap(canonical) < 1e-9 and gaps.span_sum_gap(sampled) < 1e-9
    assert float((canonical.mass * gaps.span_bias(canonical).abs()).sum()) > 0.1  # the tokenisation bias is no rounding


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_span_has_the_gradient_of_the_path_kl_once_the_settled_past_alone_is_dropped(
    student: Any, teacher: Any
) -> None:
    reading = readings.random_pair(student, teacher)
    wanted, learner = gaps.path_kl_gradient(reading), readings.Learner(reading)
    assert torch.allclose(learner.credited_gradient(gaps.whole_credit(reading)), wanted, atol=1e-9, rtol=0)
    assert torch.allclose(learner.credited_gradient(gaps.settled_credit(reading)), wanted, atol=1e-9, rtol=0)
    # As it is, `span` also drops teacher terms whose place depends on the token that is credited.
    assert readings.relative(gaps.span_gradient(reading), wanted) > 0.05


def test_span_has_the_gradient_of_the_path_kl_if_no_later_byte_moves_a_boundary() -> None:
    reading = readings.random_pair(bpe_a, letters)
    assert torch.allclose(gaps.span_gradient(reading), gaps.path_kl_gradient(reading), atol=1e-9, rtol=0)


def test_a_gradient_without_the_stop_event_is_found() -> None:
    """The same comparison fails if the credit leaves out what the teacher says of stop."""
    reading = readings.random_pair(bpe_a, letters)
    written = reading.batch.written
    stops = reading.path.logp_t[torch.from_numpy(written.teacher.stop)]
    whole = reading.teacher_logps() - stops - reading.per_path(reading.path.logp_s)
    gradient = readings.Learner(reading).credited_gradient(reading.per_token(whole))
    assert readings.relative(gradient, gaps.path_kl_gradient(reading)) > FAULT


def test_sequence_kl_has_the_gradient_of_the_mean_gap_over_tokens_where_all_paths_have_as_many() -> None:
    reading = readings.fixed_pair(bpe_a, bpe_b)
    learner = readings.Learner(reading)
    wanted = learner.expectation_gradient(lambda logp: gaps.normalised_gap(reading, logp)) / 3
    assert torch.allclose(gaps.sequence_gradient(reading), wanted, atol=1e-9, rtol=0)
    assert readings.relative(gaps.sequence_gradient(reading), wanted * 3 / 2) > FAULT  # stop is a token too


def test_sequence_kl_is_a_policy_gradient_of_the_gap_over_tokens() -> None:
    reading = readings.random_pair(bpe_a, bpe_b)
    learner = readings.Learner(reading)
    gap = gaps.normalised_gap(reading, reading.per_path(reading.path.logp_s))
    wanted = learner.expectation_gradient(lambda logp: gap / reading.lengths)
    assert torch.allclose(gaps.sequence_gradient(reading), wanted, atol=1e-9, rtol=0)
    assert readings.turned(gaps.sequence_gradient(reading), gaps.path_kl_gradient(reading)) > 0.1


@pytest.mark.parametrize("teacher", [bpe_b, unigram])
def test_chunks_between_breaks_are_text_events_once_both_ends_are_conditioned_on(teacher: Callable[[], Toy]) -> None:
    """With the break at the end alone, or none, a perfect model's chunk is no event of text."""
    reading = readings.perfect_pair(bpe_a, teacher)
    t, breaks = chunks_of(reading, student=False), between_breaks(reading)
    assert mean_gap(reading, t.logp + t.break_after - t.break_before - t.true_between, breaks) < ROUNDING
    assert mean_gap(reading, t.logp + t.break_after - t.true_break, breaks) > 0.01
    assert mean_gap(reading, t.logp - t.true, breaks) > 0.01


def test_a_teacher_whose_tokens_cross_words_has_no_such_events() -> None:
    reading = readings.perfect_pair(bpe_b, bpe_a)
    t = chunks_of(reading, student=False)
    gap = t.logp + t.break_after - t.break_before - t.true_between
    assert mean_gap(reading, gap, between_breaks(reading)) > FAULT


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_a_perfect_student_is_moved_by_span_though_every_texts_log_ratio_is_zero(student: Any, teacher: Any) -> None:
    reading = readings.perfect_pair(student, teacher)
    assert gaps.span_totals(reading).abs().max() < 1e-9
    assert gaps.span_gradient(reading).norm() > 0.05
    for credit in (gaps.whole_credit(reading), gaps.settled_credit(reading)):
        assert readings.Learner(reading).credited_gradient(credit).norm() < 1e-9


def test_log_probs_of_the_batch_are_those_of_the_distributions() -> None:
    """The reader's own rendering and packing carry every path, with its probability."""
    reading = readings.random_pair(bpe_a, bpe_b)
    assert float(reading.mass.sum()) == pytest.approx(1, abs=ROUNDING)
    assert torch.allclose(reading.per_path(reading.path.logp_s).exp(), reading.mass, atol=ROUNDING)
    assert bool(reading.batch.alignment.chunk_exact.all())


def test_the_table_keeps_its_own_word() -> None:
    """Claims that are called exact are so; the others miss by more than rounding."""
    for row in gaps.gap_table():
        assert row["kind"] in ("exact", "bound", "approximate")
        assert np.isfinite(row["gap"])
        if row["kind"] == "exact":
            assert abs(row["gap"]) < 1e-9, row
        elif row["kind"] == "approximate":
            assert abs(row["gap"]) > 1e-6, row
        else:
            assert abs(row["gap"]) < 1e-6, row
