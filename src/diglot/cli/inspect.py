"""`diglot inspect STUDENT TEACHER`: what a pair is before money is spent on it."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import shlex
from collections.abc import Sequence
from typing import Any

from diglot.cli.loading import (
    add_data_options,
    add_rendering_options,
    add_tokenizer_options,
    check_counts,
    check_place,
    data_options,
    load_model,
    rendering_options,
    tokenizer_words,
)
from diglot.cli.names import check_data, check_model_name
from diglot.cli.options import load_options
from diglot.cli.parsing import Parser
from diglot.cli.screen import show_phases
from diglot.phases import LOADING, phase
from diglot.quiet import at_level

EXAMPLE = """exit code: 0 the pair can be trained, 1 it cannot, 2 a wrong argument.

example:
  diglot inspect HuggingFaceTB/SmolLM2-135M-Instruct \\
      Qwen/Qwen2.5-1.5B-Instruct --data prompts.jsonl
"""


def parser() -> Parser:
    """The parser of the command."""
    parser = Parser(
        prog="diglot inspect",
        usage="diglot inspect STUDENT TEACHER [--data NAME] [--OPTION VALUE ...]",
        description="Look at a student and a teacher before training: tokenizers, templates, stops, alignment, "
        "objectives. Reads tokenizers only, unless --with-models.",
        epilog=EXAMPLE,
    )
    parser.add_argument("student", metavar="STUDENT", help="a model id or folder; one with a tokenizer alone will do")
    parser.add_argument("teacher", metavar="TEACHER", help="the same")
    parser.add_argument(
        "--data", metavar="NAME", help="texts to measure on, as --dataset_name of train; else built-in ones"
    )
    parser.add_argument("--split", default="train", help="split of --data (default: train)")
    add_data_options(parser)
    add_rendering_options(parser)
    add_tokenizer_options(parser, "student", "teacher")
    parser.add_argument("--rows", type=int, default=256, help="rows of --data that are read (default: 256)")
    parser.add_argument("--details", action="store_true", help="show what the verdict rests on: many tables")
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    weights = parser.add_argument_group("with weights")
    weights.add_argument("--with-models", action="store_true", help="load both models and run them")
    weights.add_argument("--with_models", action="store_true", help=argparse.SUPPRESS)
    weights.add_argument("--model_rows", type=int, default=32, help="rows that the models read (default: 32)")
    weights.add_argument("--batch_size", type=int, default=8, help="texts of a step, for the estimates (default: 8)")
    weights.add_argument("--max_completion_length", type=int, default=32, help="tokens of a sample (default: 32)")
    weights.add_argument("--dtype", default="auto", help="number type of both models (default: the files' own)")
    weights.add_argument("--device", default=None, help="where they run (default: cuda if there is one)")
    return parser


def inspect(arguments: Sequence[str]) -> int:
    """Inspect and print; the exit code says whether the pair can be trained."""
    options = parser().parse_args(arguments)
    check_counts(options, "rows", "model_rows", "batch_size", "max_completion_length")
    check_data(options.data, "--data")
    check_model_name(options.student, "student", "STUDENT")
    check_model_name(options.teacher, "teacher", "TEACHER")
    show_phases()
    with phase(LOADING):
        from diglot.inspection import inspect_pair
        from diglot.inspection.load import load_input
    if options.with_models:
        check_place(options.device, options.dtype)

    samples = _samples(options) if options.data else None
    with phase("Loading both tokenizers"):
        student = load_input(options.student, "student", options.tokenizer_kwargs)
        teacher = load_input(options.teacher, "teacher", options.teacher_tokenizer_kwargs)
    floor = float(load_options()["min_coverage"].default)
    # What renderers warn of is part of the verdict, where it matters for the rows.
    quiet = at_level("diglot.rendering", logging.ERROR)
    with phase("Reading texts with both, trying every objective"), quiet:
        inspection = inspect_pair(
            student, teacher, samples, data=options.data, min_coverage=floor, **rendering_options(options)
        )
    inspection = dataclasses.replace(inspection, verdict=_with_data(inspection, options, samples or []))
    if options.with_models and inspection.student is not None:
        inspection = dataclasses.replace(inspection, models=_with_models(options, student, teacher, samples))
    if options.json:
        print(json.dumps(inspection.to_dict(), ensure_ascii=False, indent=1))
    else:
        from diglot.report.inspection import print_inspection

        print_inspection(inspection, details=options.details)
    return 0 if inspection.verdict.trainable else 1


def _samples(options: Any) -> list[Any]:
    from diglot.data import load_dataset, to_sample

    data = load_dataset(options.data, split=options.split, **data_options(options))
    return [to_sample(row, f"{options.data} row {i}") for i, row in enumerate(itertools.islice(data, options.rows))]


def _with_data(inspection: Any, options: Any, samples: list[Any]) -> Any:
    """The verdict with what the data adds to it: options for the command, prompts that no template is used for."""
    verdict = inspection.verdict
    words = [f"--{n} {shlex.quote(v)}" for n in ("dataset_format", "dataset_columns") if (v := getattr(options, n))]
    words += [f"--markers {options.markers}"] if options.markers != "read" else []
    words += ["--fold_system"] if options.fold_system else []
    words += tokenizer_words(options)
    if verdict.command is not None and words:
        verdict = dataclasses.replace(verdict, command=" ".join([verdict.command, *words]))
    plain = sum(sample.conversation.messages is None and bool(sample.conversation.text) for sample in samples)
    sides = (inspection.student, inspection.teacher)
    if plain and all(side is not None and side.has_template for side in sides):
        warning = (
            f"{plain} of {len(samples)} rows have prompts of plain text, and both models have chat templates: neither "
            "is used. If they are questions to an assistant, give --dataset_columns user=prompt,assistant=completion."
        )
        verdict = dataclasses.replace(verdict, warnings=(*verdict.warnings, warning))
    return verdict


def _with_models(options: Any, student: Any, teacher: Any, samples: list[Any] | None) -> Any:
    from diglot.batches import PairReader
    from diglot.inspection import inspect_models
    from diglot.rendering import Renderer
    from diglot.teachers import LocalTeacher

    models: list[Any] = []
    renderers = []
    for one, role in ((student, "student"), (teacher, "teacher")):
        model = load_model(one.name, options.device, options.dtype)
        models.append(model)
        renderers.append(Renderer.of_model(model, one.tokenizer, name=role, **rendering_options(options)))
    same = renderers[0].vocabulary.same_as(renderers[1].vocabulary)
    return inspect_models(
        models[0],
        LocalTeacher(models[1], renderers[1]),
        PairReader(*renderers, same_vocabulary=same),
        None if samples is None else samples[: options.model_rows],
        batch_size=options.batch_size,
        max_completion_length=options.max_completion_length,
    )
