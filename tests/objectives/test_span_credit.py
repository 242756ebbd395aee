"""Forms of credit inside a chunk, the reference teacher, and canonical text, of the span policy gradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.chunk_problem import DOUBLE, aligned, plain_end, random_alignment, random_path, side, tokens_of
from torch import Tensor

from diglot.alignment import Alignment
from diglot.errors import ConfigError
from diglot.objectives import Pair, Path, make_objective
from diglot.objectives.credit import CREDITS
from diglot.objectives.span import clipped_policy_gradient, span_advantages, suffix_in_chunk

PAIR = Pair(False, 4, 5, torch.tensor([0, 1]), torch.tensor([2, 1]), torch.tensor([3]), torch.tensor([4]))


def span(**options: Any):
    return make_objective("span", PAIR, **options)


def advantage(path: Path, alignment: Alignment[Tensor], **options: Any) -> Tensor:
    return span(**options)(path, alignment)[0].metrics["advantage"]


def plain(
    path: Path,
    alignment: Alignment[Tensor],
    *,
    gamma: float = 1.0,
    credit: str = "variance_reduced",
    reference_alpha: float | None = None,
    noncanonical: str = "none",
) -> list[float]:
    """Advantage of each student token, from its definition, chunk by chunk and token by token."""
    own_s, own_t = path.logp_s.tolist(), path.logp_t.tolist()
    worth_s, worth_t = own_s, own_t
    if reference_alpha is not None:
        worth_s = [reference_alpha * (a - b) for a, b in zip(own_s, path.logp_reference_s.tolist(), strict=True)]
        worth_t = [a - b for a, b in zip(own_t, path.logp_reference_t.tolist(), strict=True)]
    count, segment = alignment.num_chunks, alignment.chunk_segment.tolist()
    members = [tokens_of(alignment.chunk_s, k) for k in range(count)]
    usable = [
        bool(alignment.chunk_exact[k]) and not (noncanonical == "mask" and bool(path.noncanonical[members[k]].any()))
        for k in range(count)
    ]
    gains, rewards = [], []
    for k in range(count):
        gain = sum(worth_t[j] for j in tokens_of(alignment.chunk_t, k))
        if noncanonical == "boundary":
            gain += plain_end(path.boundary_t, alignment.chunk_t, alignment, k)
            gain -= plain_end(path.boundary_s, alignment.chunk_s, alignment, k)
        gains.append(gain)
        rewards.append((gain - sum(worth_s[i] for i in members[k])) * usable[k])
    result = [0.0] * len(own_s)
    for k in range(count):
        later = sum(gamma ** (m - k) * rewards[m] for m in range(k + 1, count) if segment[m] == segment[k])
        for at, i in enumerate(members[k] if usable[k] else []):
            own = {
                "variance_reduced": gains[k] - sum(worth_s[m] for m in members[k][at:]),
                "shared": rewards[k],
                "uniform": rewards[k] / len(members[k]),
                "proportional": rewards[k] * own_s[i] / sum(own_s[m] for m in members[k]),
            }
            result[i] = own[credit] + later
    return result


@pytest.mark.parametrize("credit", [c for c in CREDITS if c != "whole"])
@pytest.mark.parametrize(
    "options",
    [{}, {"reference_alpha": 0.5}, {"noncanonical": "mask"}, {"noncanonical": "boundary"}],
    ids=str,
)
@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_advantages_are_their_definition(credit: str, options: dict[str, Any], gamma: float, seed: int) -> None:
    alignment = random_alignment(seed)
    path = random_path(alignment, seed)
    advantages = advantage(path, alignment, credit=credit, gamma=gamma, **options)
    assert advantages.dtype == DOUBLE
    assert advantages.tolist() == pytest.approx(plain(path, alignment, credit=credit, gamma=gamma, **options), abs=1e-9)


def test_proportional_credit_is_the_published_formula() -> None:
    """DPCA: `(l^T / l^S - 1) log p_i`."""
    path = Path(torch.tensor([-1.0, -3.0], dtype=DOUBLE), torch.tensor([-2.0], dtype=DOUBLE))
    advantages = advantage(path, aligned(side([1, 2]), side([2])), credit="proportional", gamma=0.0)
    assert advantages.tolist() == pytest.approx([(-2 / -4 - 1) * -1, (-2 / -4 - 1) * -3])


@pytest.mark.parametrize("credit", ["uniform", "proportional"])
@pytest.mark.parametrize("options", [{}, {"reference_alpha": 0.5}, {"noncanonical": "boundary"}], ids=str)
def test_uniform_and_proportional_credit_conserve_the_reward_of_a_chunk(credit: str, options: dict[str, Any]) -> None:
    alignment = random_alignment(2)
    path = random_path(alignment, 2)
    advantages = advantage(path, alignment, credit=credit, gamma=0.0, **options)
    shared = advantage(path, alignment, credit="shared", gamma=0.0, **options)
    several = 0
    for k in range(alignment.num_chunks):
        tokens = tokens_of(alignment.chunk_s, k)
        several += len(tokens) > 1
        assert advantages[tokens].sum().item() == pytest.approx(shared[tokens[0]].item(), abs=1e-12)
    assert several and not torch.allclose(advantages, shared)


def test_proportional_credit_of_a_certain_chunk_is_uniform() -> None:
    path = Path(torch.zeros(2), torch.tensor([-2.0]))
    assert advantage(path, aligned(side([1, 2]), side([2])), credit="proportional").tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("credit", [c for c in CREDITS if c != "whole"])
def test_equal_vocabularies_leave_nothing_to_share(credit: str) -> None:
    alignment = aligned(side([1, 2, 4]), side([1, 2, 4]))
    path = Path(torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-0.5, -3.0, -0.25]))
    assert advantage(path, alignment, credit=credit, gamma=0.0).tolist() == [0.5, -1.0, 0.25]


def test_equal_likelihoods_of_chunks_give_no_credit() -> None:
    """Not token by token: the variance-reduced form keeps the terms that are zero only on average."""
    alignment = aligned(side([1, 2, 3]), side([2, 3]))
    path = Path(torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-3.0, -0.5]))
    for credit in ("shared", "uniform", "proportional"):
        assert advantage(path, alignment, credit=credit).abs().max() == 0
    assert advantage(path, alignment).tolist() == [0.0, -1.0, 0.0]


def test_sums_to_the_end_of_a_chunk_do_not_need_negative_values() -> None:
    sums = suffix_in_chunk(torch.tensor([1.0, -2.0, 4.0, 8.0]), torch.tensor([0, 0, 0, -1]), 1)
    assert sums.tolist() == [3.0, 2.0, 4.0, 0.0]


def test_clipped_rewards_are_what_is_shared() -> None:
    path = Path(torch.tensor([-300.0, -100.0]), torch.tensor([-1.0]))
    alignment = aligned(side([1, 2]), side([2]))
    assert advantage(path, alignment, credit="shared", reward_clip=8.0).tolist() == [8.0, 8.0]
    assert advantage(path, alignment, credit="proportional", reward_clip=8.0).tolist() == [6.0, 2.0]


def test_masked_chunks_get_no_gradient_and_give_no_reward_to_others() -> None:
    alignment = aligned(side([1, 2, 3, 4]), side([1, 3, 4]))
    logp = torch.full((4,), -1.0, requires_grad=True)
    path = Path(logp, torch.tensor([-2.0, -9.0, -1.5]), noncanonical=torch.tensor([False, False, True, False]))
    values, mask = span(noncanonical="mask")(path, alignment)
    assert values.metrics["advantage"].tolist() == [-1.5, 0.0, 0.0, -0.5]
    assert mask.all() and torch.equal(mask, span(noncanonical="mask").mask(alignment))
    values.loss.sum().backward()
    assert logp.grad is not None and logp.grad.tolist() == [1.5, 0.0, 0.0, 0.5]
    assert advantage(path, alignment)[1] != 0


def test_advantages_are_constants_whatever_they_are_made_of() -> None:
    alignment = random_alignment(3)
    path = random_path(alignment, 3)
    values, _ = span(noncanonical="boundary")(path, alignment)
    assert not values.metrics["advantage"].requires_grad
    values.loss.sum().backward()
    assert path.boundary_s.grad is None and path.logp_s.grad is not None


def test_boundaries_of_no_mass_on_either_side_add_nothing() -> None:
    alignment = aligned(side([1, 2, 3]), side([1, 2, 3]))
    never = torch.tensor([0.0, -torch.inf, -1.0])
    path = Path(torch.full((3,), -1.0), torch.full((3,), -1.0), boundary_s=never, boundary_t=never)
    assert advantage(path, alignment, noncanonical="boundary").tolist() == [0.0, 0.0, 0.0]
    likelier = replace(path, boundary_t=torch.tensor([0.0, -5.0, -1.0]))
    assert advantage(likelier, alignment, noncanonical="boundary", gamma=0.0).tolist() == [100.0, 0.0, 0.0]


# ---- the expected gradient, by going through every text -------------------------------------------------------------

Cut = Callable[[Sequence[int]], list[int]]
LETTERS, LENGTH = 2, 3
PREFIXES = [p for n in range(LENGTH) for p in itertools.product(range(LETTERS), repeat=n)]
TEXTS = list(itertools.product(range(LETTERS), repeat=LENGTH))


def fixed_cut(text: Sequence[int]) -> list[int]:
    """One token of two letters, one of one: whatever the letters are."""
    return [2, 3]


def merging_cut(text: Sequence[int]) -> list[int]:
    """ "01" is one token wherever it stands, so a later letter decides whether a token ends after "0"."""
    return [i for i in range(1, len(text) + 1) if tuple(text[i - 1 : i + 1]) != (0, 1)]


class ToyDistribution:
    """A student that writes letter by letter, and scores of a teacher that reads the texts as `cut` cuts them."""

    def __init__(self, cut: Cut, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.cut = cut
        self.logits = torch.randn(len(PREFIXES), LETTERS, generator=generator, dtype=DOUBLE).requires_grad_()
        pieces = sorted({piece for text in TEXTS for piece in self.pieces(text)})
        scores = -2 * torch.rand(len(pieces), generator=generator, dtype=DOUBLE)
        self.score = dict(zip(pieces, scores.tolist(), strict=True))

    def pieces(self, text: Sequence[int]) -> list[tuple[tuple[int, ...], int]]:
        """Each token as what is written up to its end, and where it begins."""
        ends = self.cut(text)
        return [(tuple(text[:end]), start) for start, end in zip([0, *ends], ends, strict=False)]

    def logp_s(self, text: Sequence[int]) -> Tensor:
        rows = [PREFIXES.index(tuple(text[:i])) for i in range(len(text))]
        return self.logits.log_softmax(-1)[rows, list(text)]

    def logp_t(self, text: Sequence[int]) -> Tensor:
        return torch.tensor([self.score[piece] for piece in self.pieces(text)], dtype=DOUBLE)

    def reverse_kl_gradient(self) -> Tensor:
        total = torch.zeros((), dtype=DOUBLE)
        for text in TEXTS:
            logp = self.logp_s(text).sum()
            total = total + logp.exp() * (logp - self.logp_t(text).sum())
        return torch.autograd.grad(total, self.logits)[0]

    def expected_gradient(self, of_token: Callable[[Tensor, Tensor, Alignment[Tensor]], Tensor]) -> Tensor:
        """Mean over all texts of the surrogate's gradient, given each token's advantage."""
        total = torch.zeros_like(self.logits)
        for text in TEXTS:
            logp, logp_t = self.logp_s(text), self.logp_t(text)
            alignment = aligned(side(range(1, LENGTH + 1)), side(self.cut(text)))
            advantages = of_token(logp.detach(), logp_t, alignment)
            surrogate = clipped_policy_gradient(logp, logp.detach(), advantages, 0.2)[0].sum()
            total += logp.detach().sum().exp() * torch.autograd.grad(surrogate, self.logits)[0]
        return total


def credited(credit: str) -> Callable[[Tensor, Tensor, Alignment[Tensor]], Tensor]:
    def of_token(logp_s: Tensor, logp_t: Tensor, alignment: Alignment[Tensor]) -> Tensor:
        return span_advantages(logp_s, logp_t, alignment, gamma=1.0, length_normalization=False, credit=credit)

    return of_token


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shared_and_variance_reduced_credit_have_the_gradient_of_the_reverse_kl(seed: int) -> None:
    """At gamma 1, where the letters do not decide where chunks end. The two advantages themselves differ."""
    distribution = ToyDistribution(fixed_cut, seed)
    exact = distribution.reverse_kl_gradient()
    for credit in ("shared", "variance_reduced"):
        torch.testing.assert_close(distribution.expected_gradient(credited(credit)), exact, rtol=0, atol=1e-12)
    for credit in ("uniform", "proportional"):
        assert (distribution.expected_gradient(credited(credit)) - exact).norm() > 0.02 * exact.norm()


def test_the_whole_text_as_one_reward_has_it_always_but_chunks_that_later_letters_end_do_not() -> None:
    """The bias that the docstring names, at its size: it is in what is left out, not in the brute force."""
    distribution = ToyDistribution(merging_cut, 0)
    exact = distribution.reverse_kl_gradient()

    def whole_text(logp_s: Tensor, logp_t: Tensor, alignment: Alignment[Tensor]) -> Tensor:
        return logp_t.sum() - suffix_in_chunk(logp_s, torch.zeros_like(alignment.chunk_s), 1)

    torch.testing.assert_close(distribution.expected_gradient(whole_text), exact, rtol=0, atol=1e-12)
    for credit in ("shared", "variance_reduced"):
        assert (distribution.expected_gradient(credited(credit)) - exact).norm() > 0.02 * exact.norm()


# ---- options ----------------------------------------------------------------------------------------------------


def test_boundaries_and_references_are_read_only_where_an_option_asks() -> None:
    assert not span().reads_boundaries and not span().reads_references
    assert span(noncanonical="boundary").reads_boundaries and span(reference_alpha=0.5).reads_references
    bare = Path(torch.zeros(1), torch.zeros(1))
    alignment = aligned(side([1]), side([1]))
    with pytest.raises(ConfigError, match="'span' reads boundary masses"):
        span(noncanonical="boundary")(bare, alignment)
    with pytest.raises(ConfigError, match="two reference models"):
        span(reference_alpha=0.5)(bare, alignment)
    with pytest.raises(ConfigError, match=r"path\.noncanonical"):
        span(noncanonical="mask")(bare, alignment)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"credit": "equal"}, "credit='equal' is unknown: choose one of variance_reduced, shared"),
        ({"noncanonical": "drop"}, "noncanonical='drop'"),
        ({"noncanonical": "boundary", "reference_alpha": 0.5}, "boundary masses of the two reference models"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        span(**options)


@pytest.mark.parametrize("seed", range(3))
def test_whole_credit_is_the_text_s_ratio_without_what_the_student_wrote_before(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    student, teacher = side([1, 3, 4, 6, 7]), side([3, 4, 5, 7])
    logp_s, logp_t = (-torch.rand(n, generator=draw, dtype=torch.float64) for n in (5, 4))
    advantages = advantage(Path(logp_s, logp_t), aligned(student, teacher), credit="whole")
    torch.testing.assert_close(advantages, logp_t.sum() - logp_s.flip(0).cumsum(0).flip(0))


def test_whole_credit_cannot_be_discounted() -> None:
    with pytest.raises(ConfigError, match=r"gamma=0\.9 would discount"):
        make_objective("span", PAIR, credit="whole", gamma=0.9)


# ---- several replies to one prompt ----------------------------------------------------------------------------------


def by_hand(whole: list[list[float]], ends: list[float], prompts: list[int]) -> list[list[float]]:
    """Each token's worth less the mean of the other replies' at its place; behind its end a reply keeps its last."""
    rows = []
    for i, row in enumerate(whole):
        others = [j for j, prompt in enumerate(prompts) if prompt == prompts[i] and j != i]
        at = [[whole[j][k] if k < len(whole[j]) else ends[j] for j in others] for k in range(len(row))]
        rows.append([own - sum(rest) / max(len(rest), 1) for own, rest in zip(row, at, strict=True)])
    return rows


@pytest.mark.parametrize("seed", range(4))
def test_other_replies_to_the_prompt_are_the_baseline_of_whole_credit(seed: int) -> None:
    alignment = random_alignment(seed)
    path, segments = random_path(alignment, seed), alignment.num_segments
    prompts = [k % 2 for k in range(segments)]
    chunk = alignment.chunk_s.clamp(min=0)
    of, scored = (
        alignment.chunk_segment[chunk].tolist(),
        ((alignment.chunk_s >= 0) & alignment.chunk_exact[chunk]).tolist(),
    )
    whole = advantage(path, alignment, credit="whole").tolist()
    tokens = [[i for i, s in enumerate(of) if s == k and scored[i]] for k in range(segments)]
    exact_t = alignment.chunk_exact[alignment.chunk_t.clamp(min=0)] & (alignment.chunk_t >= 0)
    of_t = alignment.chunk_segment[alignment.chunk_t.clamp(min=0)]
    ends = [float(path.logp_t[exact_t & (of_t == k)].sum()) for k in range(segments)]
    expected = by_hand([[whole[i] for i in one] for one in tokens], ends, prompts)
    prompted = replace(path, prompt=torch.tensor(prompts))
    for options in ({"credit": "whole"}, {}):
        got = advantage(prompted, alignment, **options)
        for k, one in enumerate(tokens):
            if prompts.count(prompts[k]) > 1 or options:
                assert got[one].tolist() == pytest.approx(expected[k], abs=1e-9)
    assert torch.equal(advantage(replace(path, prompt=torch.arange(segments)), alignment), advantage(path, alignment))


def test_what_a_reply_is_measured_against_does_not_depend_on_the_reply() -> None:
    """Else a token would be credited with what it changes in its own baseline, which is a bias."""
    alignment = random_alignment(1)
    path = replace(random_path(alignment, 1), prompt=torch.zeros(alignment.num_segments, dtype=torch.int64))
    mine = alignment.chunk_segment[alignment.chunk_s.clamp(min=0)] == 0
    changed = replace(path, logp_s=torch.where(mine, path.logp_s - 1.0, path.logp_s))
    alone = [replace(one, prompt=None) for one in (path, changed)]
    baselines = [
        advantage(plain, alignment, credit="whole") - advantage(prompted, alignment, credit="whole")
        for plain, prompted in zip(alone, (path, changed), strict=True)
    ]
    torch.testing.assert_close(baselines[0][mine], baselines[1][mine])
    assert not torch.allclose(baselines[0][~mine], baselines[1][~mine])


def test_discounted_returns_keep_the_credit_of_chunks() -> None:
    alignment = random_alignment(2)
    path = random_path(alignment, 2)
    prompted = replace(path, prompt=torch.zeros(alignment.num_segments, dtype=torch.int64))
    assert torch.equal(advantage(prompted, alignment, gamma=0.9), advantage(path, alignment, gamma=0.9))
