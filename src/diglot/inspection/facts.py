"""The result of an inspection: plain values only, so that it can be printed, kept as JSON and shown on a page."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from diglot.disk import finite

Outcome = Literal["works", "weak", "fails"]


@dataclass(frozen=True)
class Stop:
    """One id that ends a turn."""

    id: int
    text: str
    source: str  # template, generation config, tokenizer eos, joined by " + "


@dataclass(frozen=True)
class SideFacts:
    """One model's tokenizer and template."""

    name: str  # as it was given
    kind: str  # how its tokens spell bytes; see `Vocabulary.kind`
    rows: int  # rows of the embedding, or ids of the tokenizer where no model's configuration is there
    text_tokens: int  # ids that stand for bytes
    control_tokens: int  # named ids that stand for none
    padding_rows: int
    missing_bytes: int  # of the 256 byte values, those that no token of one byte writes
    stops: tuple[Stop, ...]  # the first is the one that this side writes
    bos: str | None
    adds_bos: bool  # does the tokenizer put BOS before plain text?
    template_bos: bool  # does the chat template begin with it?
    has_template: bool
    opens_thinking: bool  # does its own generation prompt end inside a think block?
    notes: tuple[str, ...] = ()  # what it leaves out of the conversations, or reads unlike its file or its user


@dataclass(frozen=True)
class Token:
    """One token of a rendering."""

    id: int
    text: str
    role: str  # name of a `Role`, in lower case
    control: bool


@dataclass(frozen=True)
class Rendering:
    """The first row, without data a built-in conversation, as both sides read it."""

    student: tuple[Token, ...]
    teacher: tuple[Token, ...]


@dataclass(frozen=True)
class Overlap:
    """Tokens with equal bytes on both sides. Shares are in [0, 1]."""

    count: int
    of_student: float  # of the student's text tokens
    of_teacher: float
    mass_student: float  # of the tokens that the student's tokenizer gives for the texts
    mass_teacher: float


@dataclass(frozen=True)
class Agreement:
    """How both sides cut the texts. The three shares are of the student's tokens, stop included, and add up to 1."""

    texts: int
    num_bytes: int
    tokens_student: int  # without stops
    tokens_teacher: int
    one_to_one: float
    in_chunks: float  # in chunks of several tokens that both sides cut alike
    unalignable: float  # in chunks with a token that is not exactly its text, or in none
    tokens_per_byte_student: float
    tokens_per_byte_teacher: float
    bytes_cut_unlike: float  # share of all bytes that lie in no one-to-one token
    inexact_texts_student: float  # share of texts that the tokenizer cannot write as they are
    inexact_texts_teacher: float


@dataclass(frozen=True)
class Critical:
    """One class of text whose tokens carry more meaning than their number says."""

    name: str
    places: int  # in the texts
    tokens_student: int  # that touch them
    tokens_teacher: int
    num_bytes: int  # of the places
    cut_unlike: float  # share of these bytes in no one-to-one token; 0 where there are none
    one_to_one: float  # shares of the student's tokens there; NaN-free: 0 where there are none
    aligned: float  # one-to-one or in an exact chunk
    cuts: int  # rows of such tokens behind which the text was ended, to see what an objective of pairs would compare
    goes_on: float  # share of these rows that it compares where the text goes on as it is; 0 where there are none
    ends: float  # share that it compares where the text ends there
    example: tuple[tuple[str, ...], tuple[str, ...]] | None  # the first place that the sides cut unlike, both cuts


@dataclass(frozen=True)
class Reencoding:
    """Of texts cut where a token ends: how often the beginning alone gives other ids than it has in the whole."""

    cuts: int
    changed_student: float
    changed_teacher: float


@dataclass(frozen=True)
class ObjectiveFacts:
    """What one objective could do with the pair, by its own answer."""

    name: str
    outcome: Outcome
    reason: str
    needs: str  # of the teacher
    share: float | None  # of the student's tokens whose rows or log-probs it reads, where that is countable


@dataclass(frozen=True)
class Verdict:
    """Can the pair be trained, with what, and how to start."""

    trainable: bool
    problems: tuple[str, ...]  # what stops it
    warnings: tuple[str, ...]
    objectives: tuple[ObjectiveFacts, ...]
    objective: str | None  # the one to start with
    command: str | None


@dataclass(frozen=True)
class ModelFacts:
    """What only the weights can say. Errors are standard errors over samples."""

    bits_per_byte_student: float
    bits_per_byte_teacher: float
    bits_per_byte_error: float  # of the difference of the two
    headroom_nats_per_byte: float  # reverse KL of the student's own samples
    headroom_error: float
    surprisal_nats_per_byte: float  # the student's own, on the same samples
    stop_agreement: float
    sample_coverage: float
    parameters_student: int
    parameters_teacher: int
    batch_size: int
    tokens_per_text: int  # prompt and completion, student's side, mean
    gib_weights: float  # both models
    gib_optimizer: float  # gradients and AdamW's two moments
    gib_activations: float  # saved for the student's backward pass, one batch
    gib_logits: float  # one block of rows on both sides
    seconds_sampling: float
    seconds_student: float  # forward and backward
    seconds_teacher: float
    says: tuple[str, ...]  # what follows, in words

    @property
    def gib_total(self) -> float:
        """Memory of a step, GiB: an estimate from below, allocators take more."""
        return self.gib_weights + self.gib_optimizer + self.gib_activations + self.gib_logits

    @property
    def seconds_total(self) -> float:
        """Seconds of one on-policy step on this machine, without the loss stage."""
        return self.seconds_sampling + self.seconds_student + self.seconds_teacher


@dataclass(frozen=True)
class Inspection:
    """All that is known about a pair before training. What a broken pair does not let us know is None."""

    student_name: str
    teacher_name: str
    texts: str  # where the texts come from
    verdict: Verdict
    student: SideFacts | None = None
    teacher: SideFacts | None = None
    same: bool | None = None
    difference: str = ""  # why not the same, or what padding there is
    rendering: Rendering | None = None
    overlap: Overlap | None = None
    agreement: Agreement | None = None
    critical: tuple[Critical, ...] = ()
    reencoding: Reencoding | None = None
    models: ModelFacts | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a number that is not known (NaN) is None."""
        values: dict[str, Any] = finite(dataclasses.asdict(self))
        return values
