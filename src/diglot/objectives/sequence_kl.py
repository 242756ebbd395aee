"""One scalar per segment: how much likelier, per token, the text is to the student than to the teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from diglot.alignment import Alignment
from diglot.objectives.base import PathObjective, at_least_float32
from diglot.objectives.scores import Path, Values


def mean_logp(logp: Tensor, chunk: Tensor, alignment: Alignment[Tensor]) -> Tensor:
    """Mean of `logp [N]` over the tokens of each segment that lie in exact chunks, `[S]`; 0 for a segment without.

    `chunk [N]` is the chunk of each token.
    """
    zeros = logp.new_zeros(alignment.num_segments)
    if not alignment.num_chunks:
        return zeros
    inside = alignment.in_exact_chunk(chunk)
    segment = alignment.chunk_segment[chunk.clamp(min=0)]
    count = zeros.index_add(0, segment, inside.to(logp.dtype))
    return zeros.index_add(0, segment, torch.where(inside, logp, 0.0)) / count.clamp(min=1)


def sequence_gap(path: Path, alignment: Alignment[Tensor]) -> Tensor:
    """`mean log p_student - mean log p_teacher` of each segment, `[S]`, in nats per token.

    Each side is normalised by its own number of tokens in exact chunks, stop included.
    """
    mean_s = mean_logp(at_least_float32(path.logp_s), alignment.chunk_s, alignment)
    mean_t = mean_logp(at_least_float32(path.logp_t.detach()), alignment.chunk_t, alignment)
    return mean_s - mean_t


class SequenceKL(PathObjective):
    """Half the square of the gap of length-normalised log-likelihoods, one value per segment.

    With d the gap, the gradient is `d * grad(mean log p_student)`. On text that the student has just written, and for
    a fixed number of tokens, that is in expectation the gradient of the length-normalised reverse KL divided by that
    number (score function, no baseline). On other text it pulls the student's normalised likelihood to the teacher's.

    It can teach how likely a whole text should be. It cannot teach which token was wrong: one scalar is spread over
    all tokens of the segment alike, and alternatives that were not written are never seen.
    """

    name = "sequence_kl"

    def mask(self, alignment: Alignment[Tensor]) -> Tensor:
        """Segments with at least one exact chunk, `[S]`."""
        exact = torch.zeros(alignment.num_segments, dtype=torch.int64, device=alignment.chunk_segment.device)
        return exact.index_add(0, alignment.chunk_segment, alignment.chunk_exact.long()) > 0

    def __call__(self, path: Path, alignment: Alignment[Tensor]) -> tuple[Values, Tensor]:
        gap = sequence_gap(path, alignment)
        return Values(0.5 * gap.square(), {"sequence_kl": gap.detach()}), self.mask(alignment)
