"""Which objective for what: one line each on what it sees, when it is zero, what it costs, and when to use it."""

from __future__ import annotations

from dataclasses import dataclass

from diglot.objectives.levels import Level
from diglot.objectives.registry import OBJECTIVES

NEEDS = {
    Level.TEXT_LOGPROBS: "log-probs of the text",
    Level.TOP_K: "top-k",
    Level.CHOSEN: "chosen ids",
    Level.HIDDEN: "hidden states",
}


@dataclass(frozen=True)
class About:
    """One row of the decision table, in plain words. `V` vocabulary, `K` shared tokens, `k` chosen ones."""

    sees: str
    zero: str
    cost: str  # of one row beyond both models' bodies
    use: str


GUIDE: dict[str, About] = {
    "jsd": About(
        "all tokens, at every row",
        "distributions equal",
        "V_s + V_t",
        "equal vocabularies: the textbook form, and GKD's default",
    ),
    "covering": About(
        "the teacher's k likeliest continuations of the text so far, at every student token",
        "equal distributions over texts",
        "V_s + V_t + branches",
        "any pair: GKD's default across tokenizers",
    ),
    "strict": About(
        "the student's k likeliest shared tokens, at one-to-one rows",
        "distributions equal on the chosen tokens (with residual: and outside)",
        "V_s + 2k",
        "to compare with the published form, or where all is cut alike: its rows are chosen by how the text went on, "
        "which can destroy numbers",
    ),
    "top_k": About(
        "the teacher's k likeliest tokens and the rest, at one-to-one rows",
        "distributions equal on them and in the rest",
        "V_s + k",
        "a served teacher that gives top-k, equal vocabularies",
    ),
    "bpm": About(
        "all student tokens, at every student row",
        "student = byte-prefix marginal of the teacher",
        "V_s + V_t + rows inside teacher tokens",
        "given texts; on the student's own it can run away",
    ),
    "shared_prefix": About(
        "cells of shared prefixes, at every shared boundary",
        "cell distributions equal",
        "V_s + V_t",
        "to compare, or where all is cut alike",
    ),
    "byte": About(
        "the next byte, at every byte",
        "byte distributions equal (and the anchor: never)",
        "V_s + V_t + prefix ranges",
        "vocabularies with little in common, byte-level models",
    ),
    "escd": About(
        "as bpm, and one step of completion at written pieces",
        "never: the completion is a cross-entropy",
        "bpm + written children",
        "the teacher has long tokens that the student must write in pieces",
    ),
    "alm": About(
        "chunks of the text as events",
        "chunk likelihoods equal",
        "V_s + V_t, once each",
        "a teacher that gives log-probs only; given texts",
    ),
    "span": About(
        "what was sampled, as rewards",
        "chunk likelihoods equal",
        "V_s + V_t, once each",
        "a teacher that gives log-probs only; on-policy at a low learning rate",
    ),
    "sequence_kl": About(
        "one number per text",
        "length-normalised likelihoods equal",
        "V_s + V_t, once each",
        "as a weak anchor beside another objective",
    ),
    "ce": About("the written text", "never", "V_s", "reference text; not on the student's own samples"),
    "xtoken_p": About(
        "the teacher's likeliest tokens through a projection",
        "projected distribution equal on them",
        "V_s + V_t + top-k",
        "to compare with X-Token (its P)",
    ),
    "xtoken_h": About(
        "nearly equal tokens, and sorted leftovers",
        "only if all tokens match",
        "V_s + V_t + two sorts",
        "to compare with X-Token (its H)",
    ),
    "gold": About(
        "shared tokens, and sorted leftovers, at merged chunks",
        "only if all tokens match",
        "V_s + V_t + two sorts",
        "to compare with TRL; gold_as_shipped=True for its own reading",
    ),
    "uld": About(
        "sorted probabilities, not which token has them",
        "equal spectra, whatever they mean",
        "V_s + V_t + two sorts",
        "as a baseline only",
    ),
    "simct": About(
        "shared tokens and written units, by length-normalised score",
        "scores equal (not: distributions equal)",
        "V_s + V_t",
        "to compare with SimCT",
    ),
    "dskd": About(
        "the other model's hidden states through trained maps",
        "hidden states agree, whatever the distributions",
        "2 V_s + 2 V_t + maps",
        "to compare with DSKD",
    ),
}


def table() -> list[tuple[str, str, About]]:
    """(name, what it needs of the teacher, about) of every objective, in the order of `GUIDE`."""
    return [(name, NEEDS[OBJECTIVES[name].needs], about) for name, about in GUIDE.items()]


def markdown() -> str:
    """The table as the documentation shows it."""
    head = "| objective | needs of the teacher | sees | zero when | cost of a row | use it for |"
    rows = [f"| `{name}` | {needs} | {a.sees} | {a.zero} | {a.cost} | {a.use} |" for name, needs, a in table()]
    return "\n".join([head, "|---|---|---|---|---|---|", *rows]) + "\n"
