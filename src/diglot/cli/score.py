"""`diglot score`: a teacher's scores of fixed texts, once, for any student."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diglot.cli.loading import (
    add_data_options,
    add_rendering_options,
    add_tokenizer_options,
    check_counts,
    data_options,
    json_mapping,
    rendering_options,
)
from diglot.cli.names import check_data, check_folder, check_model_name
from diglot.cli.parsing import Parser
from diglot.cli.screen import show_phases
from diglot.phases import LOADING, phase

EXAMPLE = """example:
  diglot score --teacher Qwen/Qwen2.5-1.5B-Instruct --data replies.jsonl \\
      --out runs/scores --level bytes
  diglot train --teacher_model_name_or_path runs/scores \\
      --lmbda 0 --objective byte ...

Options that `diglot train` has as well mean the same there. Interrupted, the same command goes on where it was.
"""


def parser() -> Parser:
    """The parser of `diglot score`."""
    made = Parser(
        prog="diglot score",
        usage="diglot score --teacher NAME --data NAME --out FOLDER [--OPTION VALUE ...]",
        description="Let a teacher score the replies of a dataset once, and keep what it said.",
        epilog=EXAMPLE,
    )
    add = made.add_argument
    add("--teacher", required=True, help="A model id, a folder, or a .gguf file.")
    add("--data", required=True, help="A hub id, a JSONL, Parquet or CSV file, or a folder; rows with replies.")
    add("--out", required=True, help="The folder of the scores.")
    add(
        "--level",
        default="logprobs",
        choices=["logprobs", "top_k", "bytes"],
        help="What is kept of each token: its log-prob; also the k likeliest ids; or the next-byte distributions "
        "(default: logprobs).",
    )
    add("--k", type=int, default=16, help="How many likeliest ids top_k keeps (default: 16).")
    add("--dataset_config", help="Configuration of a hub dataset.")
    add_data_options(made)
    add("--dataset_train_split", default="train", help="Which split is scored (default: train).")
    add("--teacher_tokenizer_name_or_path", help="The teacher's tokenizer, when it is not beside its weights.")
    add("--teacher_model_revision", help="Revision of the teacher's model and tokenizer.")
    add("--teacher_trust_remote_code", action="store_true", help="Run code of the teacher's repository.")
    add_tokenizer_options(made, "teacher")
    add("--teacher_model_init_kwargs", type=json_mapping, default={}, help="JSON: arguments for `from_pretrained`.")
    add("--teacher_chat_template_kwargs", type=json_mapping, default={}, help="JSON: arguments for the chat template.")
    add_rendering_options(made)
    add("--teacher_system_prompt", help="A text that the teacher reads before everything else.")
    add("--teacher_max_length", type=int, help="Longest text in teacher tokens.")
    add("--score_turns", default="last", choices=["last", "all"], help="Which assistant turns are scored.")
    add("--thinking", action="store_true", help="Replies start inside a think block, as the student's prompts do.")
    add("--batch_size", type=int, default=8, help="Texts that are read at a time (default: 8).")
    add("--shard_texts", type=int, default=512, help="Texts in a file (default: 512).")
    return made


def score(arguments: Sequence[str]) -> int:
    """Score the texts; returns the exit code."""
    options = parser().parse_args(list(arguments))
    check_counts(options, "k", "batch_size", "shard_texts")
    if options.teacher_max_length is not None:
        check_counts(options, "teacher_max_length")
    check_data(options.data, "--data")
    check_folder(Path(options.out).expanduser(), "--out")
    check_model_name(options.teacher, "teacher", "--teacher", options.teacher_model_revision)
    own, revision = options.teacher_tokenizer_name_or_path, options.teacher_model_revision
    if own is not None:
        check_model_name(own, "teacher's tokenizer", "--teacher_tokenizer_name_or_path", revision)
    show_phases()
    with phase(LOADING):
        from tqdm.auto import tqdm

        from diglot.data import load_dataset, to_sample
        from diglot.teachers.scoring import Manner, Reading, score_texts

    split = options.dataset_train_split
    rows: Any = load_dataset(options.data, config=options.dataset_config, split=split, **data_options(options))
    samples = [to_sample(row, f"{options.data} row {i}") for i, row in enumerate(rows)]
    with phase(f"Loading the teacher {options.teacher}"):
        teacher, eos = _teacher(options)
    with tqdm(total=len(samples), desc="Scoring texts", disable=None) as bar:  # on a terminal
        folder = score_texts(
            teacher,
            samples,
            Path(options.out).expanduser(),
            data=options.data,
            reading=Reading(
                options.score_turns,
                options.teacher_system_prompt,
                options.thinking,
                options.teacher_chat_template_kwargs,
                options.teacher_max_length,
                **rendering_options(options),
            ),
            manner=Manner(options.level, options.k, options.batch_size, options.shard_texts),
            generation_eos=eos,
            progress=lambda done, of: bar.update(done - bar.n),
        )
    index = folder.index
    print(
        f"{options.out} holds the {options.level} of {index['texts']:,} texts: {index['tokens']:,} tokens, "
        f"{index['bytes']:,} bytes."
    )
    if index["skipped"]:
        print(f"{index['skipped']:,} texts are left out: their prompts fill teacher_max_length.")
    return 0


def _teacher(options: argparse.Namespace) -> tuple[Any, Any]:
    """The teacher, and the end-of-text ids of its generation config."""
    import torch

    from diglot.rendering import Renderer
    from diglot.teachers import LocalTeacher, find_teacher_tokenizer
    from diglot.teachers.loading import load_teacher_model, split_gguf

    own = {"revision": options.teacher_model_revision, "trust_remote_code": options.teacher_trust_remote_code}
    model = load_teacher_model(options.teacher, options.teacher_model_init_kwargs, **own)
    place, kwargs = split_gguf(options.teacher, options.teacher_model_init_kwargs)
    tokenizer = find_teacher_tokenizer(
        model,
        tokenizer_name_or_path=options.teacher_tokenizer_name_or_path,
        model_name_or_path=place,
        gguf_file=kwargs.get("gguf_file"),
        arguments=options.teacher_tokenizer_kwargs,
        **own,
    )
    renderer = Renderer.of_model(
        model,
        tokenizer,
        chat_template_kwargs=options.teacher_chat_template_kwargs,
        name="teacher",
        **rendering_options(options),
    )
    teacher = LocalTeacher(model, renderer, options.teacher_max_length)
    teacher.to("cuda" if torch.cuda.is_available() else "cpu")
    return teacher, getattr(model.generation_config, "eos_token_id", None)
