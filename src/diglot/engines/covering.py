"""A teacher's named tokens as a distribution over the student's next token, given the text so far.

Where a student token starts, the teacher's next bytes begin with a token behind its reading of the text so far, or are
the rest of a token that began earlier and runs past that place. So each of the teacher's named tokens counts at every
start of a student token that it reaches (Phan et al., arXiv 2410.09303; Vieira et al., arXiv 2412.03719). The objective
`covering` asks the teacher about what the rows of the whole text do not say; here nothing more is asked, and what they
leave open is counted.

Shapes: `N_t` scored teacher tokens, `K` named ids of a row, `R` starts of student tokens, `L` leaves: a named token at
a start that it reaches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from diglot.arrays import Floats, Ints
from diglot.batches import Written
from diglot.engines.likeliest import Likeliest, likeliest_of
from diglot.engines.reaching import Beyond, Named, find_leaves, mass_beside, mass_ended
from diglot.objectives.covering_ahead import Cuts, Leaves, TeacherText, settle
from diglot.objectives.covering_cells import CellMap, Neighbours, Probes, Seams
from diglot.objectives.covering_plan import Boundaries, find_boundaries
from diglot.objectives.covering_rows import RowsRead
from diglot.objectives.tail import TailTokens
from diglot.rendering import Renderer
from diglot.vocabulary.maps import first_tokens, greedy_tokens

_NEGLIGIBLE = 1e-3  # of the mass of a start: a leaf of less is not tried against the student's tokenizer
_REMEMBERED = 2**20  # leaves that are tried before what is known about pairs of tokens is let go


class FirstTokens(CellMap):
    """Each student token by itself. Which one a teacher's token begins may depend on what follows: `Probes` tell."""

    def __init__(self, student: Renderer, teacher: Renderer) -> None:
        own, other = self.student, self.teacher = student.vocabulary, teacher.vocabulary
        self.rest, self.first = greedy_tokens(other, own), first_tokens(other, own, student.encoder.spell)
        self.cell = np.where(own.lengths > 0, np.arange(len(own)), -1)
        self.size = (own.lengths > 0).astype(np.int64)
        self.members = np.argsort(self.cell, kind="stable")
        self.begin = np.searchsorted(self.cell[self.members], np.arange(len(own) + 1))


_NO_TOKENS = TailTokens(*(np.zeros(0, dtype=np.int64) for _ in TailTokens.__dataclass_fields__))


@dataclass(frozen=True)
class Known:
    """What was found out about texts of a few tokens so far."""

    student: Neighbours
    beyond: Beyond
    seams: Seams


@dataclass(frozen=True)
class Shares:
    """Of each start's mass, `[R]`."""

    stop: Floats
    vague: Floats  # where no row was read
    prefix: Floats  # the mass itself, as its logarithm; NaN where it is a bound alone


class Covering:
    """Of one pair of sides. Threads may share it."""

    def __init__(self, student: Renderer, teacher: Renderer) -> None:
        self.student, self.teacher = student, teacher
        self.first = FirstTokens(student, teacher)
        self.probes = Probes(self.first, student.encoder.spell, teacher.encoder.spell)
        self._tried, self._known = 0, self._nothing_known()
        self._stops = np.array(sorted(teacher.stop_ids), dtype=np.int64)

    @np.errstate(invalid="ignore", over="ignore")
    def distribution(self, written: Written, logps: Floats, ids: Ints, top: Floats) -> tuple[Likeliest, Ints]:
        """What the teacher expects next at each start of a student token that can be compared.

        Args:
            logps: `[N_t]` nats, of the written tokens; stop as one event.
            ids, top: `[N_t, K]`, the ids that each row names and their log-probs; -1 and -inf where there are fewer.

        Returns:
            The distribution, at most `K + 1` ids of each start, and the student tokens that begin there, `[R]`.
        """
        t, table = written.teacher, self.teacher.vocabulary
        plan, _ = find_boundaries(written, self.student.vocabulary, table, self.teacher.encoder.spell)
        named = Named.of(ids, top, t.ids, logps)
        of_stop = np.where(t.stop, np.exp(logps), named.of_only(self._stops))
        leaves, pieces = find_leaves(plan, named, table, self._stops, self.first)
        known = self._known_now(len(leaves.mass))
        own, (ended, sure) = plan.last < 0, mass_ended(plan, named)
        whole = own + ended + np.bincount(leaves.boundary, leaves.mass * (leaves.consumed > 0), minlength=plan.items)
        beside = mass_beside(plan, named, pieces, whole, known.beyond)
        whole = whole + beside
        lost = ~(np.isfinite(whole) & (whole > 0))  # behind a token that the teacher holds impossible
        whole[lost] = 1.0
        shares = Shares(
            np.where(own & ~lost, of_stop[plan.main], 0.0) / whole,
            np.where(lost, 1.0, (ended + beside) / whole),
            np.where(sure & (beside == 0) & ~lost, named.before[plan.main] + np.log(whole), np.nan),
        )
        leaves = leaves.at(np.flatnonzero(~lost[leaves.boundary]))
        leaves = replace(leaves, mass=leaves.mass / whole[leaves.boundary])
        return self._named(plan, written, named, leaves, shares, known, ids.shape[1] + 1), plan.student

    def _named(
        self,
        plan: Boundaries,
        written: Written,
        named: Named,
        leaves: Leaves,
        shares: Shares,
        known: Known,
        most: int,
    ) -> Likeliest:
        """From leaves to the student's ids."""
        s, count = written.student.ids, plan.items
        previous = np.where(plan.previous >= 0, s[np.maximum(plan.previous, 0)], -1)
        settled = settle(
            leaves,
            previous,
            Cuts(self.first, self.probes, known.student, known.seams),
            _NO_TOKENS,
            TeacherText(written.teacher.ids, written.teacher.segment),
            _rows(named, self._stops),
            None,
            _NEGLIGIBLE,
        )
        share, some, stops = settled.share, np.flatnonzero(settled.mass > 0), np.flatnonzero(shares.stop > 0)
        row = np.concatenate([settled.boundary[some], stops])
        name = np.concatenate([settled.cell[some], np.full(len(stops), self.student.stop_id)])
        mass = np.concatenate([settled.mass[some], shares.stop[stops] / share[stops]])
        vague = settled.vague + shares.vague / share
        more = _of_written(plan, s, (row, name, mass), vague, shares.prefix + np.log(share))
        at = np.flatnonzero(more > 0)
        ids, logps, residual = likeliest_of(
            np.concatenate([row, at]),
            np.concatenate([name, s[plan.student[at]]]),
            np.concatenate([mass, more[at]]),
            count,
            most,
        )
        return Likeliest(ids, logps, residual, np.clip(vague - more, 0.0, residual))

    def _known_now(self, tried: int) -> Known:
        """What is known already, begun anew before it takes too much memory."""
        if self._tried > _REMEMBERED:
            self._tried, self._known = 0, self._nothing_known()
        self._tried += tried
        return self._known

    def _nothing_known(self) -> Known:
        student, teacher = (Neighbours(side.vocabulary, side.encoder.spell) for side in (self.student, self.teacher))
        return Known(student, Beyond(self.teacher.vocabulary, teacher), Seams(self.first, self.student.encoder.spell))


def _rows(named: Named, stops: Ints) -> RowsRead:
    """The rows of the text as far as looking ahead reads them."""
    none = np.zeros(0)
    is_text = ~np.isin(named.ids, stops) & (named.ids >= 0)
    top = np.where(is_text, named.logps, -np.inf)
    with np.errstate(divide="ignore"):
        stop = np.log(named.of_only(stops))
    ids = np.where(is_text, named.ids, 0)
    return RowsRead(none, stop, none, ids, top, none.astype(np.int64), none.astype(np.int64), none, none)


def _of_written(
    plan: Boundaries, ids_s: Ints, known: tuple[Ints, Ints, Floats], vague: Floats, prefix: Floats
) -> Floats:
    """How much of what is vague begins with the written token, at least, `[R]`.

    The mass of the texts so far with it is known at the next start, if nothing is vague there.

    Args:
        known: rows, ids and masses that are named.
        prefix: log mass of each start that a student could have written; NaN where it is not known.
    """
    row, name, mass = known
    y = ids_s[plan.student]
    already = np.bincount(row, mass * (name == y[row]), minlength=plan.items)
    behind = np.where((plan.following >= 0) & (vague[plan.following] == 0), prefix[plan.following], np.nan)
    with np.errstate(invalid="ignore"):
        whole = np.exp(np.minimum(behind - prefix, 0.0))
    return np.where(np.isfinite(whole), np.clip(whole - already, 0.0, vague), 0.0)
