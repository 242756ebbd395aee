"""An inspection in the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from diglot.inspection import Inspection, ModelFacts
from diglot.inspection.facts import Critical, ObjectiveFacts, Rendering, SideFacts, Token, Verdict
from diglot.inspection.texts import BUILT_IN
from diglot.report.alignment import escape

ROLE_STYLES = {
    "prompt": "cyan",
    "content": "green",
    "reasoning": "magenta",
    "tool_call": "yellow",
    "markup": "dim",
    "stop": "bold red",
}
OUTCOME_STYLES = {"works": "green", "weak": "yellow", "fails": "red"}


def print_inspection(inspection: Inspection, console: Console | None = None, details: bool = True) -> None:
    """Print the verdict and the command to start with, then what it rests on: all of it, or one line.

    Text of the models is shown as it is, never read as markup.
    """
    console = console or Console()
    for line in _verdict(inspection.verdict):
        console.print(line, highlight=False, soft_wrap=line.no_wrap is True)
    for part in _parts(inspection) if details else _short(inspection):
        console.print(part)


def _short(inspection: Inspection) -> Iterable[RenderableType]:
    if inspection.agreement is not None:
        one = inspection.agreement
        yield Text(
            f"On {inspection.texts}: {one.one_to_one:.0%} of the student's tokens are one token on both sides, "
            f"{one.in_chunks:.0%} lie in chunks of several, {one.unalignable:.0%} cannot be aligned."
        )
    if inspection.models is not None:
        yield _models(inspection.models)
    yield Text("Tokenizers, templates, alignment and every objective: --details.", style="dim")


def _parts(inspection: Inspection) -> Iterable[RenderableType]:
    if inspection.student is not None and inspection.teacher is not None:
        yield _sides(inspection.student, inspection.teacher)
        yield _relation(inspection)
    if inspection.rendering is not None:
        yield _rendering(inspection.rendering, "One conversation" if inspection.texts == BUILT_IN else "The first row")
    if inspection.agreement is not None:
        yield _numbers(inspection)
    if inspection.critical:
        yield _critical(inspection.critical)
    if inspection.models is not None:
        yield _models(inspection.models)
    if inspection.verdict.objectives:
        yield _objectives(inspection.verdict.objectives)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, name in enumerate(columns):
        table.add_column(name, overflow="fold", justify="left" if i == 0 else "default")
    return table


def _sides(student: SideFacts, teacher: SideFacts) -> Table:
    table = _table("Tokenizers", "", "student", "teacher")

    def row(name: str, *values: str) -> None:
        table.add_row(name, *map(Text, values))

    both = (student, teacher)
    row("model", *(s.name for s in both))
    row("kind", *(s.kind for s in both))
    row("rows", *(f"{s.rows:,}" for s in both))
    row(
        "  with bytes / named / padding",
        *(f"{s.text_tokens:,} / {s.control_tokens:,} / {s.padding_rows:,}" for s in both),
    )
    row("bytes without a token", *(str(s.missing_bytes) for s in both))
    row("chat template", *("yes" if s.has_template else "none" for s in both))
    row("stops", *("\n".join(f"{one.text} ({one.id}, {one.source})" for one in s.stops) for s in both))
    row("BOS", *(_bos(s) for s in both))
    row("opens a think block", *("yes" if s.opens_thinking else "no" for s in both))
    return table


def _bos(side: SideFacts) -> str:
    if side.bos is None:
        return "none"
    where = [text for text, is_so in (("plain text", side.adds_bos), ("the template", side.template_bos)) if is_so]
    return f"{side.bos}, {'put before ' + ' and '.join(where) if where else 'not put before anything'}"


def _relation(inspection: Inspection) -> Text:
    same = "The vocabularies are the same." if inspection.same else f"The vocabularies differ: {inspection.difference}."
    return Text(f"{same} {inspection.difference}\n" if inspection.same else f"{same}\n")


def _rendering(rendering: Rendering, what: str) -> RenderableType:
    table = _table(f"{what}, as each side reads it", "student", "teacher")
    table.add_row(_tokens(rendering.student), _tokens(rendering.teacher))
    legend = Text(" ").join(Text(role, style=style) for role, style in ROLE_STYLES.items())
    return Group(table, Text("roles: ") + legend, Text())


def _tokens(tokens: Sequence[Token]) -> Text:
    """The text of all tokens; each role in its colour, control tokens underlined."""
    shown = Text()
    for (role, control), run in groupby(tokens, key=lambda t: (t.role, t.control)):
        style = f"{ROLE_STYLES.get(role, '')}{' underline' if control else ''}"
        shown.append("".join(token.text for token in run), style=style.strip())
    return shown


def _numbers(inspection: Inspection) -> Table:
    agreed, shared, again = inspection.agreement, inspection.overlap, inspection.reencoding
    assert agreed is not None and shared is not None and again is not None
    table = _table(f"On {inspection.texts}: {agreed.texts} texts, {agreed.num_bytes:,} bytes", "", "student", "teacher")

    def row(name: str, student: str, teacher: str = "") -> None:
        table.add_row(name, student, teacher)

    row("tokens", f"{agreed.tokens_student:,}", f"{agreed.tokens_teacher:,}")
    row("tokens per byte", f"{agreed.tokens_per_byte_student:.3f}", f"{agreed.tokens_per_byte_teacher:.3f}")
    row(f"shared tokens ({shared.count:,}), of the vocabulary", f"{shared.of_student:.1%}", f"{shared.of_teacher:.1%}")
    row("shared tokens, of the tokens in the texts", f"{shared.mass_student:.1%}", f"{shared.mass_teacher:.1%}")
    row("one token on both sides", f"{agreed.one_to_one:.1%}")
    row("in chunks of several tokens", f"{agreed.in_chunks:.1%}")
    row("bytes that both sides cut differently", f"{agreed.bytes_cut_unlike:.1%}")
    row("not alignable", f"{agreed.unalignable:.1%}")
    row(
        "texts that it cannot write as they are",
        f"{agreed.inexact_texts_student:.1%}",
        f"{agreed.inexact_texts_teacher:.1%}",
    )
    row("cuts after which re-encoding gives other ids", f"{again.changed_student:.1%}", f"{again.changed_teacher:.1%}")
    return table


def _critical(rows: Sequence[Critical]) -> Table:
    table = _table(
        "Where meaning is dense",
        "",
        "places",
        "bytes",
        "cut unlike",
        "aligned",
        "pairs: goes on / ends",
        "a place cut unlike",
    )
    for one in rows:
        shares = (f"{one.num_bytes:,}", f"{one.cut_unlike:.0%}", f"{one.aligned:.0%}") if one.places else ("", "", "")
        rows_seen = f"{one.goes_on:.0%} / {one.ends:.0%}" if one.cuts else ""
        table.add_row(one.name, str(one.places), *shares, rows_seen, Text(_cuts(one)))
    return table


def _cuts(one: Critical) -> str:
    if one.example is None:
        return ""
    sides = (
        "|".join("".join(c if c.isprintable() else escape(c) for c in piece) for piece in side) for side in one.example
    )
    return "  /  ".join(sides)


def _models(facts: ModelFacts) -> RenderableType:
    table = _table("With weights", "", "student", "teacher")

    def row(name: str, student: str, teacher: str = "") -> None:
        table.add_row(name, student, teacher)

    row("parameters", f"{facts.parameters_student / 1e6:,.1f} M", f"{facts.parameters_teacher / 1e6:,.1f} M")
    row("bits per byte of the texts", _number(facts.bits_per_byte_student), _number(facts.bits_per_byte_teacher))
    row("  error of the difference", _number(facts.bits_per_byte_error))
    row(
        "reverse KL of the student's samples, nats per byte",
        _with_error(facts.headroom_nats_per_byte, facts.headroom_error),
    )
    row("  the student's own surprisal", _number(facts.surprisal_nats_per_byte))
    row("stop agreement", _number(facts.stop_agreement))
    row("alignment coverage of the samples", _number(facts.sample_coverage))
    row(f"memory of a step of {facts.batch_size} texts of {facts.tokens_per_text} tokens", f"{facts.gib_total:.2f} GiB")
    row(
        "  weights, optimizer, activations, logits",
        " + ".join(
            f"{x:.2f}" for x in (facts.gib_weights, facts.gib_optimizer, facts.gib_activations, facts.gib_logits)
        ),
    )
    row("time of it, here", f"{facts.seconds_total:.1f} s")
    row(
        "  sampling, student, teacher",
        " + ".join(f"{x:.1f}" for x in (facts.seconds_sampling, facts.seconds_student, facts.seconds_teacher)),
    )
    return Group(table, *(Text(f"- {line}") for line in facts.says))


def _number(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.3f}"


def _with_error(value: float, error: float) -> str:
    return _number(value) if math.isnan(error) else f"{value:.3f} ± {error:.3f}"


def _objectives(rows: Sequence[ObjectiveFacts]) -> Table:
    table = _table("Objectives", "", "outcome", "reads", "needs of the teacher", "why")
    for one in rows:
        reads = "" if one.share is None else f"{one.share:.0%}"
        table.add_row(
            one.name,
            Text(one.outcome, style=OUTCOME_STYLES[one.outcome]),
            reads,
            one.needs,
            Text(one.reason.split(". ")[0]),
        )
    return table


def _verdict(verdict: Verdict) -> list[Text]:
    """The verdict, the command to start with, then why not, or what to look out for."""
    lines = [Text("Verdict: this pair cannot be trained as it is.", style="bold red")]
    if verdict.trainable:
        start = f"Verdict: this pair can be trained; start with objective {verdict.objective}:"
        lines = [Text(start, style="bold green")]
    if verdict.command is not None:
        lines.append(Text(f"  {verdict.command}", no_wrap=True))
        lines.append(Text("Objectives side by side, in plain words: diglot objectives", style="dim"))
    lines += [Text(f"! {problem}", style="red") for problem in verdict.problems]
    lines += [Text(f"- {warning}", style="yellow") for warning in verdict.warnings]
    return lines
