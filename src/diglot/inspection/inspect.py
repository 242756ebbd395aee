"""From two tokenizers and texts to an `Inspection`. No weights are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from diglot.batches import AlignedBatch, PairReader, align_pairs
from diglot.data import Sample
from diglot.errors import DiglotError, RenderingError
from diglot.inspection import measure, verdict
from diglot.inspection.facts import Inspection, Rendering, SideFacts, Stop, Token, Verdict
from diglot.inspection.load import Input, load_input
from diglot.inspection.texts import BUILT_IN, CONVERSATION, TEXTS
from diglot.objectives import Level, Pair
from diglot.rendering import Conversation, Renderer, Role

_FIRST_CHARACTERS = 4000  # of each text: enough to see how it is cut, and one long row must not take minutes


@dataclass(frozen=True)
class Side:
    """A model's name and how it reads."""

    name: str
    renderer: Renderer


def inspect_pair(
    student: Input | str,
    teacher: Input | str,
    samples: Sequence[Sample] | None = None,
    *,
    data: str | None = None,
    offered: Level = Level.HIDDEN,
    min_coverage: float = 0.5,
    markers: str = "read",
    fold_system: bool = False,
) -> Inspection:
    """Everything that two tokenizers, their templates and some texts say about a pair.

    A pair that cannot be read is no error: its `verdict` says so, and what it does not let us know is None.

    Args:
        student: a model id or folder, or what is known of it.
        teacher: the same of the teacher.
        samples: rows of the data; a few built-in texts when not given.
        data: the name of the dataset, for the command that the verdict proposes.
        offered: how much of its distributions the teacher will give; a local model gives hidden states.
        min_coverage: as in the trainers' options.
        markers: as in the trainers' options.
        fold_system: as in the trainers' options.
    """
    student = load_input(student, "student") if isinstance(student, str) else student
    teacher = load_input(teacher, "teacher") if isinstance(teacher, str) else teacher
    source = BUILT_IN if samples is None else data or "given rows"
    rendering: dict[str, Any] = {"markers": markers, "fold_system": fold_system}
    try:
        sides = (
            Side(student.name, _renderer(student, "student", rendering)),
            Side(teacher.name, _renderer(teacher, "teacher", rendering)),
        )
    except DiglotError as error:
        return Inspection(student.name, teacher.name, source, Verdict(False, (str(error),), (), (), None, None))
    return inspect_sides(*sides, samples, data=data, offered=offered, min_coverage=min_coverage)


def _renderer(model: Input, role: str, rendering: Mapping[str, Any]) -> Renderer:
    return Renderer(
        model.tokenizer,
        num_embeddings=model.num_embeddings,
        generation_config=model.generation_config,
        name=role,
        **rendering,
    )


def inspect_sides(
    student: Side,
    teacher: Side,
    samples: Sequence[Sample] | None = None,
    *,
    data: str | None = None,
    offered: Level = Level.HIDDEN,
    min_coverage: float = 0.5,
) -> Inspection:
    """The same for sides whose renderers exist already, as in a trainer."""
    mine, theirs = student.renderer, teacher.renderer
    pair = Pair.of_renderers(mine, theirs)
    reader = PairReader(mine, theirs, same_vocabulary=pair.same)
    problems = [] if samples is None else _without_template(reader, samples)
    built_in = Sample(Conversation(CONVERSATION[:1]), CONVERSATION[1]["content"], "built-in conversation")
    rendering, refused = _first_row(reader, [built_in] if samples is None else samples)
    problems += [refused] if refused and samples is not None else []
    unread = [f"Conversations such as this cannot be read: {refused}"] if refused and samples is None else []
    talk = next((s for s in samples or () if s.conversation.messages is not None), built_in).conversation
    texts = list(TEXTS) if samples is None else _texts(samples)
    batch = _align(reader, texts)
    side_s, side_t = _facts(student, talk), _facts(teacher, talk)
    agreed, critical = measure.agreement(batch.written), measure.critical(batch.written, mine, theirs)
    objectives = verdict.judge_objectives(pair, batch, offered)
    judged = verdict.verdict(side_s, side_t, pair.same, problems, agreed, critical, objectives, min_coverage, data)
    return Inspection(
        student_name=student.name,
        teacher_name=teacher.name,
        texts=BUILT_IN if samples is None else data or "given rows",
        verdict=replace(judged, warnings=(*unread, *judged.warnings)),
        student=side_s,
        teacher=side_t,
        same=pair.same,
        difference=mine.vocabulary.explain_difference(theirs.vocabulary)
        or mine.vocabulary.padding_note(theirs.vocabulary),
        rendering=rendering,
        overlap=measure.overlap(pair, batch.written),
        agreement=agreed,
        critical=critical,
        reencoding=measure.reencoding(mine, theirs, texts),
    )


# ---- what is read --------------------------------------------------------------------------------------------------


def _texts(samples: Sequence[Sample]) -> list[str]:
    """What will be scored or, where a row has a prompt only, the prompt: the nearest to it that we have."""
    texts = []
    for sample in samples:
        text = sample.answer.text if sample.answer else sample.reply
        if not text:
            messages = sample.conversation.messages
            text = sample.conversation.text if messages is None else str(messages[-1].get("content") or "")
        texts.append(text[:_FIRST_CHARACTERS])
    return [text for text in texts if text]


def _align(reader: PairReader, texts: Sequence[str]) -> AlignedBatch:
    """The texts as continuations, each with a stop."""
    space = Conversation(None, "\n")
    pairs = [reader.written(Sample(space, text, "text")) for text in texts]
    return align_pairs(pairs, pad_s=reader.student.stop_id, pad_t=reader.teacher.stop_id, on_policy=False)


def _without_template(reader: PairReader, samples: Sequence[Sample]) -> list[str]:
    """Conversations for a model that has no template to read them with."""
    talks = sum(s.conversation.messages is not None for s in samples)
    return [
        f"The {side.name} has no chat template and {talks} of {len(samples)} rows are conversations: it would read a "
        "transcript of a kind that it was not trained on, and what it says about the end of a reply means nothing. "
        f"Take an instruct model, give this one a template ({option}: {{chat_template: FILE.jinja}}), or "
        "give rows of plain text (`prompt`, `text`)."
        for side, option in ((reader.student, "tokenizer_kwargs"), (reader.teacher, "teacher_tokenizer_kwargs"))
        if talks and not side.has_template
    ]


def _first_row(reader: PairReader, samples: Sequence[Sample]) -> tuple[Rendering | None, str | None]:
    """The first row that both sides read, as training reads it, and why the first that stops training does so."""
    rendering: Rendering | None = None
    refused: str | None = None
    for sample in samples:
        try:
            rows = _read(reader, sample)
        except DiglotError as error:
            refused = refused or (str(error) if sample.where in str(error) else f"{sample.where}: {error}")
            continue
        if rendering is None:
            rendering = Rendering(_tokens(*rows[0], reader.student), _tokens(*rows[1], reader.teacher))
    return rendering, refused


def _read(reader: PairReader, sample: Sample) -> list[tuple[list[int], list[int]]]:
    """Ids and roles of a row on each side: of its prompt alone where the student writes the reply."""
    if sample.reply is not None:
        pair = reader.written(sample)
        assert pair is not None  # no limit of length is set, and no teacher is named
        return [(side.ids.tolist(), side.roles.tolist()) for side in (pair.student, pair.teacher)]
    thinking, reads = reader.student.opens_thinking(sample.conversation), reader.teacher_reads(sample.conversation)
    prompts = reader.student.prompt_ids(sample.conversation), reader.teacher.prompt_ids(reads, thinking=thinking)
    return [(ids.tolist(), [Role.PROMPT] * len(ids)) for ids in prompts]


def _tokens(ids: Sequence[int], roles: Sequence[int], side: Renderer) -> tuple[Token, ...]:
    """Tokens for people."""
    table = side.vocabulary
    return tuple(
        Token(i, table.display(i), Role(role).name.lower(), bool(table.control[i]))
        for i, role in zip(ids, roles, strict=True)
    )


def _facts(side: Side, conversation: Conversation) -> SideFacts:
    reader, table = side.renderer, side.renderer.vocabulary
    bos = reader.tokenizer.bos_token_id
    single = {int(b) for b in table.data[table.offsets[:-1][table.lengths == 1]]}
    try:
        prompt, opens = reader.prompt_ids(conversation), reader.opens_thinking(conversation)
    except RenderingError:
        prompt, opens = np.zeros(0, np.int64), False
    return SideFacts(
        name=side.name,
        kind=table.kind,
        rows=len(table),
        text_tokens=int((~table.control).sum()),
        control_tokens=len(table.names),
        padding_rows=int(table.control.sum()) - len(table.names),
        missing_bytes=256 - len(single),
        stops=tuple(Stop(i, table.display(i), source) for i, source in reader.stop_sources.items()),
        bos=None if bos is None or bos >= len(table) else table.display(bos),
        adds_bos=bos is not None and bos in reader.encoder.bos_ids,
        template_bos=reader.has_template and bos is not None and len(prompt) > 0 and int(prompt[0]) == bos,
        has_template=reader.has_template,
        opens_thinking=opens,
        notes=tuple(reader.notes),
    )
