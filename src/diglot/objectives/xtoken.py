"""X-Token: the student's distribution pushed forward into the teacher's vocabulary, or compared on a relaxed common
part.

Both objectives (arXiv 2605.21699) rest on `Projection`, a sparse row-stochastic W that says with which teacher tokens a
student token is written, and compare one row per exact chunk: that of the last token of either side. A chunk's merged
distribution is, by the chain rule, the last row times the probabilities of the chunk's earlier tokens: one factor
per side.

What is wrong with that, whatever W: the last tokens of a chunk need not start at the same byte, so where both sides
have several tokens the two rows can speak about different places of the text. And W is one step: that "123" is "1",
"2", "3" to the teacher takes two more steps, for which the weights 0.9, 0.09, 0.009 stand in. What the teacher says
after "1" cannot tell the student's "123" from its "124".
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from diglot.batches.sending import sent
from diglot.errors import ConfigError
from diglot.objectives.base import RowObjective, at_least_float32
from diglot.objectives.divergences import kl
from diglot.objectives.pair import Pair
from diglot.objectives.scores import Metrics, Rows, Scores, Values
from diglot.vocabulary import Projection, Vocabulary

if TYPE_CHECKING:
    from diglot.batches import Written

_LEAST_COMMON = 0.6  # weight of an entry of W from which on both tokens count as the same


class _Projected(RowObjective):
    """A row objective with a W, on the last rows of all exact chunks."""

    divides_itself: ClassVar[bool] = True
    depends_on_split: ClassVar[bool] = True
    """The total is balanced with the cross-entropy of the micro-batch."""

    def __init__(self, pair: Pair, *, projection: str | Projection | None = None, kd_temperature: float = 1.0) -> None:
        super().__init__(pair)
        if kd_temperature <= 0:
            raise ConfigError(f"kd_temperature={kd_temperature} cannot divide logits: choose a value above 0.")
        for side, stop in (("student", pair.stop_s), ("teacher", pair.stop_t)):
            if not len(stop):
                raise ConfigError(f"the {side} has an empty stop set, expected at least one id: name its stop token.")
        self.kd_temperature = kd_temperature
        self.projection = _projection(self.name, pair, projection)

    def rows(self, written: Written) -> Rows:
        """The last token of each exact chunk, on both sides."""
        alignment, exact = written.alignment, written.alignment.chunk_exact
        last_s, last_t = written.first_s + alignment.count_s - 1, written.first_t + alignment.count_t - 1
        return Rows(torch.from_numpy(last_s[exact]), torch.from_numpy(last_t[exact]))

    def loss(self, plan: Rows, scores: Scores, share: float) -> tuple[Tensor, Metrics]:
        """The paper's total, `L = stopgrad(CE / KD) * KD + CE` over the same rows."""
        loss, metrics = super().loss(plan, scores, share)
        surprisal = share * -scores.student_text(1.0)[sent(plan.student, scores.device)].sum()
        return balanced(loss, surprisal), metrics

    def _entries_without_stop(self) -> tuple[Tensor, Tensor, Tensor]:
        """Student ids, teacher ids and weights of W, `[E]` each. Stop is a column of its own on both sides."""
        ids_s, ids_t, weights = (torch.from_numpy(x) for x in self.projection.entries())
        without_stop = ~(torch.isin(ids_s, self.pair.stop_s.cpu()) | torch.isin(ids_t, self.pair.stop_t.cpu()))
        if not without_stop.any():
            raise ConfigError(
                f"objective {self.name!r}: W maps none of the student's {self.pair.size_s} tokens to any of the "
                f"teacher's {self.pair.size_t}, stop tokens aside. Check that both tokenizers are the right ones."
            )
        return ids_s[without_stop], ids_t[without_stop], weights[without_stop]

    def _softened(self, logits: Tensor) -> Tensor:
        logits = at_least_float32(logits)
        return logits if self.kd_temperature == 1.0 else logits / self.kd_temperature


class XTokenP(_Projected):
    """P-KL (X-Token, arXiv 2605.21699): `T^2 KL(q || p~)` in the teacher's vocabulary, with `p~ = W^T p_student`.

    Both distributions, at temperature T = `kd_temperature`, are renormalised on the `top_k` teacher columns of
    largest teacher logit and one stop column, the mass of each side's whole stop set. The factors of the chain-rule
    merge cancel in this. The columns are chosen per row, not per micro-batch as in the authors' code: a value must
    not depend on what else is in the block. Only teacher tokens that W names can be chosen; the others would have p~
    = 0.

    Sees every alternative that W can express. Zero iff both renormalised distributions agree; for equal vocabularies
    it is the forward KL on the chosen columns. Known biases: W is one step and its decay weights are no
    probabilities, so the loss is in general not zero for a student to which every text is as likely as to the
    teacher; teacher tokens without preimage have no part; the rows may start at different bytes (see the module).
    Metrics `mass_s`, `mass_t`: each side's probability of the chosen columns, in [0, 1].
    """

    name = "xtoken_p"

    def __init__(
        self,
        pair: Pair,
        *,
        top_k: int | None = 8192,
        kd_temperature: float = 1.0,
        projection: str | Projection | None = None,
    ) -> None:
        super().__init__(pair, projection=projection, kd_temperature=kd_temperature)
        if top_k is not None and top_k < 0:
            raise ConfigError(f"top_k={top_k} is negative: choose 0 for all teacher tokens that W names.")
        self.top_k = top_k
        self.entry_s, ids_t, weights = self._entries_without_stop()
        self.columns, self.entry_column = ids_t.unique(return_inverse=True)  # [K] teacher ids that W names
        self.entry_logw = weights.double().log()

    def __call__(self, logits_s: Tensor, logits_t: Tensor, **inputs: Tensor) -> Values:
        logits_s, logits_t = self._softened(logits_s), self._softened(logits_t)
        pushed = push_forward(logits_s, self.entry_s, self.entry_column, self.entry_logw, len(self.columns))
        named = logits_t.index_select(1, self.columns)
        if self.top_k and self.top_k < len(self.columns):
            with torch.no_grad():
                best = named.topk(self.top_k, dim=-1, sorted=False).indices
            pushed, named = pushed.gather(-1, best), named.gather(-1, best)
        chosen_s = _with_column(pushed, logits_s, self.pair.stop_s)
        chosen_t = _with_column(named, logits_t, self.pair.stop_t)
        with torch.no_grad():
            mass_s = (chosen_s.logsumexp(-1) - logits_s.logsumexp(-1)).exp()
            mass_t = (chosen_t.logsumexp(-1) - logits_t.logsumexp(-1)).exp()
        loss = kl(chosen_t.log_softmax(-1), chosen_s.log_softmax(-1))
        return Values(self.kd_temperature**2 * loss, {"mass_s": mass_s, "mass_t": mass_t})


class XTokenH(_Projected):
    """H-KL (X-Token, arXiv 2605.21699): KL on a relaxed common part, and sorted L1 on the rest.

    `T^2 (sum_M q log(q / p) + sum_r |q^(r) - p^(r)|)`, with `M = {(v, u): W[v, u] >= 0.6, u = argmax W[v]}`, one `v`
    per `u`: the heaviest, of equals the shortest. The stop sets are one more member of M. Both distributions, at
    temperature T = `kd_temperature`, are whole softmaxes, not renormalised on M. `q^(r)`, `p^(r)` are the `rest`
    largest probabilities outside M of each side, in descending order.

    Neither term alone is a divergence, since the common parts may have unequal mass, but their sum is at least zero
    (unless `rest` cuts off more than rounding), and zero iff p and q agree on M and have equal spectra outside. Unless
    M is everything, that minimum is a kink: the gradient that autograd gives there is not zero. The factors of the
    chain-rule merge are dropped, so a chunk speaks about its last token given those before.

    Known biases: the L1 term compares tokens by rank, whatever they mean; every student token outside M is pushed down
    in proportion to the teacher's mass on M; where "123" is paired with the teacher's "1", it is taken to be "1".
    Metrics `mass_s`, `mass_t`: each side's probability of the common part, in [0, 1].
    """

    name = "xtoken_h"

    def __init__(
        self,
        pair: Pair,
        *,
        rest: int = 8192,
        kd_temperature: float = 1.0,
        projection: str | Projection | None = None,
    ) -> None:
        super().__init__(pair, projection=projection, kd_temperature=kd_temperature)
        if rest < 0:
            raise ConfigError(f"rest={rest} is negative: choose 0 to leave out the sorted L1 term.")
        self.rest = rest
        ids_s, ids_t, weights = (x.numpy() for x in self._entries_without_stop())
        common = common_part(ids_s, ids_t, weights, pair.need_tables(self.name).student)
        self.common_s, self.common_t = (torch.from_numpy(x) for x in common)
        self.others_s = _others(pair.size_s, self.common_s, pair.stop_s)
        self.others_t = _others(pair.size_t, self.common_t, pair.stop_t)

    def __call__(self, logits_s: Tensor, logits_t: Tensor, **inputs: Tensor) -> Values:
        logp_s, logp_t = self._softened(logits_s).log_softmax(-1), self._softened(logits_t).log_softmax(-1)
        common_s = _with_column(logp_s.index_select(1, self.common_s), logp_s, self.pair.stop_s)
        common_t = _with_column(logp_t.index_select(1, self.common_t), logp_t, self.pair.stop_t)
        spectrum_s = _spectrum(logp_s.index_select(1, self.others_s), self.rest)
        spectrum_t = _spectrum(logp_t.index_select(1, self.others_t), self.rest)
        width = max(spectrum_s.shape[1], spectrum_t.shape[1])
        spectrum_s, spectrum_t = (pad(x, (0, width - x.shape[1])) for x in (spectrum_s, spectrum_t))
        loss = kl(common_t, common_s) + (spectrum_s - spectrum_t).abs().sum(-1)
        metrics = {"mass_s": common_s.detach().exp().sum(-1), "mass_t": common_t.detach().exp().sum(-1)}
        return Values(self.kd_temperature**2 * loss, metrics)


def balanced(loss: Tensor, cross_entropy: Tensor) -> Tensor:
    """`constant(cross_entropy / loss) * loss + cross_entropy`: both parts weigh the same (X-Token, section 3.4)."""
    factor = (cross_entropy / loss.clamp(min=1e-8)).detach()
    return factor * loss + cross_entropy


def push_forward(logits: Tensor, entry_s: Tensor, entry_column: Tensor, entry_logw: Tensor, columns: int) -> Tensor:
    """`log(W^T exp(logits))`, `[R, columns]`: the push-forward of a distribution, with its normaliser left in.

    Row `entry_s`, column `entry_column` of W is `exp(entry_logw)`, `[E]` each. Summed in logs, each column shifted by
    its largest term, so that nothing underflows however unlikely a column is.
    """
    terms = logits.index_select(1, entry_s) + entry_logw.to(logits.dtype)
    with torch.no_grad():
        shift = terms.new_full((len(terms), columns), -math.inf)
        shift = shift.scatter_reduce(1, entry_column.expand_as(terms), terms, "amax")
        shift = shift.masked_fill(shift == -math.inf, 0.0)
    scaled = (terms - shift.index_select(1, entry_column)).exp()
    mass = scaled.new_zeros(len(terms), columns).index_add(1, entry_column, scaled)
    # A column whose logits are all -inf: `log` there would turn a gradient of zero into NaN.
    dead = mass == 0
    return (mass.masked_fill(dead, 1.0).log() + shift).masked_fill(dead, -math.inf)


def common_part(
    ids_s: np.ndarray, ids_t: np.ndarray, weights: np.ndarray, student: Vocabulary
) -> tuple[np.ndarray, np.ndarray]:
    """M of H-KL, ascending by teacher id, `[M]` each, from the non-zeros of W.

    The least weight is above a half, so such an entry is the largest of its row.
    """
    heavy = weights >= _LEAST_COMMON
    ids_s, ids_t, weights = ids_s[heavy], ids_t[heavy], weights[heavy]
    # Of equals the shortest, then in order of bytes: which `v` wins must not depend on how ids are numbered.
    spelt = [student.token(i) for i in ids_s.tolist()]
    by_bytes = sorted(range(len(spelt)), key=lambda i: (len(spelt[i]), spelt[i]))
    rank = np.empty(len(spelt), dtype=np.int64)
    rank[by_bytes] = np.arange(len(spelt))
    order = np.lexsort((rank, -weights, ids_t))
    ids_s, ids_t = ids_s[order], ids_t[order]
    first = np.append(True, ids_t[1:] != ids_t[:-1])[: len(ids_t)]
    return ids_s[first], ids_t[first]


def _projection(name: str, pair: Pair, projection: str | Projection | None) -> Projection:
    """The projection that was given or saved, or one built from the pair's own vocabularies."""
    tables = pair.need_tables(name)
    if isinstance(projection, str):
        return Projection.load(projection, tables.student, tables.teacher)
    if projection is not None:
        if not isinstance(projection, Projection):
            raise ConfigError(
                f"projection={projection!r} of objective {name!r} is a {type(projection).__name__}: give a Projection, "
                "or the folder of one that Projection.save wrote."
            )
        projection.check(tables.student, tables.teacher)
        return projection.fitted(len(tables.student), len(tables.teacher))
    if tables.spell_t is None and not pair.same:
        raise ConfigError(
            f"objective {name!r} builds its projection with the teacher's tokenizer, and this pair has no spell_t: "
            "pass spell_t=ByteEncoder(...).spell to Pair.of, or projection=FOLDER of one that Projection.save wrote."
        )
    roles = [(pair.stop_s.tolist(), pair.stop_t.tolist())]
    return Projection.build(tables.student, tables.teacher, tables.spell_t or (lambda texts: []), roles=roles)


def _with_column(chosen: Tensor, logits: Tensor, ids: Tensor) -> Tensor:
    """`chosen [R, k]` and as one more column the log-sum-exp of `ids`."""
    return torch.cat([chosen, logits.index_select(1, ids).logsumexp(-1, keepdim=True)], dim=-1)


def _others(size: int, *taken: Tensor) -> Tensor:
    left = torch.ones(size, dtype=torch.bool)
    left[torch.cat([ids.cpu() for ids in taken])] = False
    return left.nonzero().squeeze(1)


def _spectrum(logp: Tensor, most: int) -> Tensor:
    """The largest probabilities of each row in descending order, at most `most`."""
    return logp.topk(min(most, logp.shape[1]), dim=-1).values.exp()
