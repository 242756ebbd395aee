"""Which objectives will work with a pair, which not and why, and the command to start with: they are asked."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from diglot.batches import AlignedBatch
from diglot.errors import DiglotError
from diglot.inspection.facts import Agreement, Critical, ObjectiveFacts, Outcome, SideFacts, Verdict
from diglot.objectives import OBJECTIVES, Level, Objective, Pair, PathObjective, Rows, guide, make_objective

SMALL = 0.02  # share of bytes cut unlike up to which objectives of one-to-one rows do no harm
SELECTED = 0.1  # difference of what is compared where a text ends and where it goes on, from which it is a choice
FEW_CUTS = 8  # below that a share of simulated cuts says nothing
_HARM = (
    "An objective of one-to-one rows sees them only in texts that happen to end a token there, which teaches the "
    "student to write less of them; covering reads every row."
)
FEW = 0.5  # an objective that reads less than this share of the student's tokens is called weak


def judge_objectives(pair: Pair, batch: AlignedBatch, offered: Level) -> tuple[ObjectiveFacts, ...]:
    """Each objective, made for the pair and shown the texts."""
    return tuple(_judge(name, pair, batch, offered) for name in guide.GUIDE)


def _judge(name: str, pair: Pair, batch: AlignedBatch, offered: Level) -> ObjectiveFacts:
    needed = OBJECTIVES[name].needs
    needs = guide.NEEDS[needed]
    if needed > offered:
        return ObjectiveFacts(name, "fails", f"the teacher offers only {guide.NEEDS[offered]}", needs, None)
    try:
        items, share = _reads(make_objective(name, pair), batch)
    except DiglotError as error:
        return ObjectiveFacts(name, "fails", str(error), needs, None)
    if not items:
        return ObjectiveFacts(name, "fails", "it finds nothing to compare in these texts", needs, share)
    outcome: Outcome = "weak" if share is not None and share < FEW else "works"
    reason = f"it reads {share:.0%} of the student's tokens; " if outcome == "weak" and share is not None else ""
    return ObjectiveFacts(name, outcome, reason + guide.GUIDE[name].use, needs, share)


def _reads(objective: Objective, batch: AlignedBatch) -> tuple[int, float | None]:
    """Items that an objective averages over, and the share of the student's tokens that it reads, if that has one."""
    total, plan = max(len(batch.written.student.ids), 1), objective.plan(batch.written)
    if isinstance(plan, Rows):
        return plan.items, len(set(plan.student.tolist())) / total
    return plan.items, int(batch.written.usable_s.sum()) / total if isinstance(objective, PathObjective) else None


def choose(same: bool, objectives: Sequence[ObjectiveFacts]) -> str | None:
    """The objective to start with, of those that work: what `auto` takes, if that is among them.

    An objective of one-to-one rows is no first choice even where the texts are cut alike everywhere: it is the
    student's own texts that are compared, and nobody has seen these yet.
    """
    works = [one.name for one in objectives if one.outcome == "works"]
    first = ["jsd"] if same else ["covering", "byte", "span"]
    return next((name for name in first + works if name in works), None)


def chosen_by_outcome(critical: Sequence[Critical]) -> list[Critical]:
    """The classes of text whose rows objectives of one-to-one pairs compare or not by how the text goes on."""
    return [one for one in critical if one.cuts >= FEW_CUTS and abs(one.ends - one.goes_on) > SELECTED]


def verdict(
    student: SideFacts,
    teacher: SideFacts,
    same: bool,
    problems: Sequence[str],
    agreement: Agreement,
    critical: Sequence[Critical],
    objectives: tuple[ObjectiveFacts, ...],
    min_coverage: float,
    data: str | None,
) -> Verdict:
    """What follows from the facts.

    Args:
        problems: what was found to stop training while the texts were read.
        min_coverage: share of aligned tokens below which training stops itself.
        data: the dataset for the command.
    """
    stops = list(problems)
    coverage = 1 - agreement.unalignable
    if coverage < min_coverage:
        stops.append(
            f"Only {coverage:.0%} of the student's tokens can be aligned; training stops itself below "
            f"{min_coverage:.0%} (min_coverage). Choose a teacher whose tokenizer keeps the text as it is."
        )
    name = choose(same, objectives)
    if name is None:
        stops.append("No objective finds anything to compare.")
    return Verdict(
        trainable=not stops,
        problems=tuple(stops),
        warnings=tuple(_warnings(student, teacher, agreement, critical, data)),
        objectives=objectives,
        objective=name,
        command=None if stops or name is None else _command(student.name, teacher.name, same, name, data),
    )


def _warnings(
    student: SideFacts, teacher: SideFacts, agreement: Agreement, critical: Sequence[Critical], data: str | None
) -> list[str]:
    warnings = []
    if student.opens_thinking != teacher.opens_thinking:
        opens, other = ("student", "teacher") if student.opens_thinking else ("teacher", "student")
        warnings.append(
            f"The {opens}'s template opens a think block and the {other}'s does not; the teacher is made to do as the "
            "student does. chat_template_kwargs may switch it off (enable_thinking: false)."
        )
    for side, name in ((student, "student"), (teacher, "teacher")):
        if not side.has_template and data is None:  # of data that are known, conversations are a problem by themselves
            warnings.append(f"The {name} has no chat template: give it plain text (`prompt`, `text`), not messages.")
        warnings += side.notes
    for share, name in ((agreement.inexact_texts_student, "student"), (agreement.inexact_texts_teacher, "teacher")):
        if share:
            warnings.append(
                f"The {name}'s tokenizer cannot write {share:.0%} of the texts as they are; what it changes is not "
                "compared."
            )
    cut = [one for one in critical if one.places and one.cut_unlike > SMALL]
    chosen = chosen_by_outcome(critical)
    if cut:
        shares = ", ".join(f"{one.name} ({one.cut_unlike:.0%} of {one.num_bytes:,} bytes)" for one in cut)
        warnings.append(f"These are cut differently: {shares}.{'' if chosen else ' ' + _HARM}")
    if chosen:
        shares = ", ".join(f"{one.name} {one.goes_on:.0%} and {one.ends:.0%} of {one.cuts}" for one in chosen)
        warnings.append(
            f"Simulated on these texts, rows that are one-to-one where a text goes on, and where it ends: {shares}. "
            + _HARM
        )
    return warnings


def _command(student: str, teacher: str, same: bool, objective: str, data: str | None) -> str:
    chosen = [] if objective == ("jsd" if same else "covering") else ["--objective", objective]
    words = [
        "diglot", "train", "--model_name_or_path", student, "--teacher_model_name_or_path", teacher,
        "--dataset_name", data or "prompts.jsonl", *chosen, "--lmbda", "1.0", "--output_dir", "runs/first",
    ]  # fmt: skip
    return shlex.join(words)
