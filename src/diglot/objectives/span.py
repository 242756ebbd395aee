"""Reverse KL between the distributions of two models over text, by policy gradient on aligned chunks.

MiniLLM (arXiv 2306.08543) with tokens replaced by chunks, the shortest pieces of text at whose ends both
tokenizers have a boundary. With equal vocabularies a chunk is a token and everything below is the paper's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diglot.alignment import Alignment
from diglot.errors import ConfigError
from diglot.objectives.base import PathObjective, check_range
from diglot.objectives.chunks import (
    NONCANONICAL,
    check_choice,
    chunk_sums,
    end_gap,
    end_masses,
    suffix_in_chunk,
    usable_chunks,
)
from diglot.objectives.credit import CREDITS, discounted_returns, remaining_chunks, replies, span_advantages
from diglot.objectives.levels import Level
from diglot.objectives.scores import Path, Values

__all__ = [
    "Span",
    "chunk_sums",
    "clipped_policy_gradient",
    "discounted_returns",
    "remaining_chunks",
    "span_advantages",
    "suffix_in_chunk",
]


def clipped_policy_gradient(
    logp: Tensor, logp_old: Tensor, advantage: Tensor, epsilon: float, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate for each token, [N], to be minimised, and which tokens were clipped, bool [N].

    `weight` are importance weights of teacher-mixed sampling; they multiply the ratio, as in the authors' code.
    At `logp == logp_old` and `weight` 1 the gradient is that of `-advantage * logp`.
    """
    ratio = (logp - logp_old).exp()
    if weight is not None:
        ratio = ratio * weight
    plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - epsilon, 1 + epsilon)
    return torch.maximum(plain, clipped), clipped > plain


class Span(PathObjective):
    """Policy-gradient reverse KL as an objective of its own: needs only log-probs of the text from the teacher.

    One value per student token. The value itself is a surrogate: its gradient is the estimate, its size means
    nothing. The metric `advantage` is what each token was credited with, in nats.

    The gradient is zero where the two likelihoods of every chunk agree: all rewards are 0 then. It sees only what was
    sampled. On the student's own text, at gamma 1 and with credit "whole", the expected gradient is that of
    KL(distribution of the student's paths || teacher's distribution of canonical paths). With "variance_reduced" or
    "shared" it is so if where chunks end does not depend on bytes that come later; they have less variance. Biases: a
    teacher that merges across a boundary depending on what follows, since rewards of "earlier chunks" that are left
    out of a return then still depend on the token; text is scored by one of the teacher's spellings of it
    (canonical-path bias); gamma below 1, clipping, and the other forms of credit (`span_advantages`).

    Args:
        credit: how a chunk's reward is shared among its tokens, see `span_advantages`. By default "whole" for texts
            of which there are several for a prompt (`num_generations`), whose mean is its baseline, if gamma is 1;
            else "variance_reduced".
        reference_alpha: if given, rewards are `(l^T - l^R) - alpha (l^S - l^ref)`: what the teacher learnt over its
            reference R against what the student learnt over itself before training (CompassOPD, arXiv 2609.10154).
            Its fixed point is the student's start times the teacher's ratio to the power `1 / alpha`, not the teacher.
        noncanonical: "mask" gives chunks that the student's tokenizer would not have written so no reward and no
            gradient. "boundary" adds `log omega_T - log omega_S` at a chunk's end to its reward, so both sides speak
            about "these bytes, then a new word or the end". omega_S is read of the student as it is now and counts as
            a reward: the gradient through it is left out.
    """

    name = "span"

    def __init__(
        self,
        gamma: float = 1.0,
        length_normalization: bool = False,
        reward_clip: float = 100.0,
        epsilon: float = 0.2,
        credit: str | None = None,
        reference_alpha: float | None = None,
        noncanonical: str = "none",
    ) -> None:
        if credit is not None:
            check_choice("credit", credit, CREDITS)
        check_choice("noncanonical", noncanonical, NONCANONICAL)
        check_range("gamma", gamma, 0.0, 1.0)
        for name, value in (("reward_clip", reward_clip), ("epsilon", epsilon)):
            if not value > 0:
                raise ConfigError(f"{name}={value} would leave no gradient: choose a value above 0.")
        if credit == "whole" and gamma != 1:
            raise ConfigError(
                f"credit='whole' sums the rewards of the whole text, and gamma={gamma} would discount them: "
                "choose gamma=1, or another credit."
            )
        if reference_alpha is not None and noncanonical == "boundary":
            raise ConfigError(
                f"reference_alpha={reference_alpha} with noncanonical='boundary' would need boundary masses of the two "
                "reference models, which are not read: use noncanonical='none' or 'mask'."
            )
        self.gamma, self.length_normalization = gamma, length_normalization
        self.reward_clip, self.epsilon = reward_clip, epsilon
        self.credit, self.reference_alpha, self.noncanonical = credit, reference_alpha, noncanonical
        if self.reads_boundaries:
            self.needs = Level.HIDDEN

    @property
    def reads_boundaries(self) -> bool:
        return self.noncanonical == "boundary"

    @property
    def reads_references(self) -> bool:
        return self.reference_alpha is not None

    def __call__(self, path: Path, alignment: Alignment[Tensor]) -> tuple[Values, Tensor]:
        old = path.logp_s.detach() if path.logp_old is None else path.logp_old
        scored_s, scored_t = self._compared(old, path)
        shared: dict[str, Any] = dict(
            gamma=self.gamma,
            length_normalization=self.length_normalization,
            reward_clip=self.reward_clip,
            shares=old,
            bonus=end_gap(*end_masses(path, alignment, self.name)) if self.reads_boundaries else None,
            usable=usable_chunks(path, alignment, self.noncanonical, self.name),
        )
        credit = self.credit or "variance_reduced"
        advantage = span_advantages(scored_s, scored_t, alignment, credit=credit, prompt=path.prompt, **shared)
        if self.credit is None and self.gamma == 1 and path.prompt is not None and alignment.num_chunks:
            whole = span_advantages(scored_s, scored_t, alignment, credit="whole", prompt=path.prompt, **shared)
            token_segment = alignment.chunk_segment[alignment.chunk_s.clamp(min=0)]
            advantage = torch.where(replies(path.prompt)[token_segment] > 1, whole, advantage)
        loss, _ = clipped_policy_gradient(path.logp_s, old, advantage, self.epsilon, path.weight)
        if path.sampler_weight is not None:
            loss = loss * path.sampler_weight
        return Values(loss, {"advantage": advantage}), self.mask(alignment)

    def _compared(self, old: Tensor, path: Path) -> tuple[Tensor, Tensor]:
        """What is summed over each side's tokens, `[N_s]` and `[N_t]`: log-probs, or their gain over a reference."""
        if self.reference_alpha is None:
            return old, path.logp_t
        if path.logp_reference_s is None or path.logp_reference_t is None:
            raise ConfigError(
                f"reference_alpha={self.reference_alpha} needs the log-probs of two reference models, and the path has "
                "none: give them, or leave reference_alpha out."
            )
        return self.reference_alpha * (old - path.logp_reference_s), path.logp_t - path.logp_reference_t
