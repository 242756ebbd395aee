"""`diglot align STUDENT TEACHER TEXT`: both tokenisations under each other."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from diglot.cli.names import check_model_name
from diglot.cli.parsing import Parser
from diglot.cli.screen import show_phases
from diglot.phases import LOADING, phase

EXAMPLE = """example:
  diglot align HuggingFaceTB/SmolLM2-135M-Instruct \\
      Qwen/Qwen2.5-1.5B-Instruct "x = 12345"
"""


def parser() -> Parser:
    """The parser of the command."""
    parser = Parser(
        prog="diglot align",
        description="Both tokenisations of a text, cut where both have a boundary (|); boundaries of one side only "
        "are ~, bytes that are no text on their own are hex. Plain ASCII when not on a terminal; NO_COLOR takes "
        "the colours alone.",
        epilog=EXAMPLE,
    )
    parser.add_argument("student", metavar="STUDENT", help="a model id or folder; one with a tokenizer alone will do")
    parser.add_argument("teacher", metavar="TEACHER", help="the same")
    parser.add_argument("text", metavar="TEXT", help="the text; - reads standard input")
    return parser


def align(arguments: Sequence[str]) -> int:
    """Print the alignment of a text, read as the continuation of something."""
    options = parser().parse_args(arguments)
    check_model_name(options.student, "student", "STUDENT")
    check_model_name(options.teacher, "teacher", "TEACHER")
    show_phases()
    encoders = []
    with phase(LOADING):
        from diglot.inspection import align_text
        from diglot.inspection.load import load_input
        from diglot.report.alignment import print_alignment
        from diglot.vocabulary import ByteEncoder, Vocabulary
    with phase("Loading both tokenizers"):
        for name, role in ((options.student, "student"), (options.teacher, "teacher")):
            one = load_input(name, role)
            encoders.append(ByteEncoder(one.tokenizer, Vocabulary.from_tokenizer(one.tokenizer, one.num_embeddings)))
    text = sys.stdin.read() if options.text == "-" else options.text
    print_alignment(align_text(encoders[0], encoders[1], text))
    return 0
