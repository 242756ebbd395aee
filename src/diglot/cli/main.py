"""`diglot COMMAND ...`"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from diglot.cli.failures import ending_on_ctrl_c, explain
from diglot.cli.screen import fitted

USAGE = """usage: diglot COMMAND ...

On-policy distillation of language models whose tokenizers differ.

before training:
  inspect        look at a pair of models: will it work, and how to start
  estimate       how much memory a run takes, part by part
  align          both tokenisations of a text under each other
  objectives     which objective for what: a table
  recipes        tested configurations: list, show, copy
  config-schema  JSON Schema of the configuration files
training and after it:
  train          distil a teacher into a student (GKD, MiniLLM)
  report         what a run did, or two: one HTML file
  eval           how good is a student, in numbers that need no tokenizer
teachers:
  score          let a teacher score fixed texts once, for any student
  serve-teacher  a teacher's log-probs in the ids of another engine's student

  diglot COMMAND --help   options of a command
  diglot --version
  diglot --install-completion   commands and options at TAB, in bash and zsh
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    0: done; 1: `inspect` found a pair that cannot be trained; 2: invalid input, reported in one message on
    standard error; 3: something failed that Diglot did not expect, with the details in a file; 130 and 143: stopped by
    Ctrl-C or SIGTERM (a run in training has saved a checkpoint).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if words[0] == "--version":
        from diglot import __version__

        print(f"diglot {__version__}")
        return 0
    try:
        with ending_on_ctrl_c():
            return _run(words[0], words[1:])
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        message, code = explain(error)
        print(fitted(f"diglot: {message}"), file=sys.stderr)
        return code


# Command -> module and function; imported when it is asked for.
COMMANDS = {
    "inspect": ("diglot.cli.inspect", "inspect"),
    "estimate": ("diglot.cli.estimate", "estimate"),
    "align": ("diglot.cli.align", "align"),
    "objectives": ("diglot.cli.objectives", "show"),
    "serve-teacher": ("diglot.cli.serve_teacher", "serve_teacher"),
    "score": ("diglot.cli.score", "score"),
    "eval": ("diglot.cli.evaluate", "evaluate"),
    "report": ("diglot.cli.report", "report"),
    "recipes": ("diglot.cli.recipes", "recipes"),
    "config-schema": ("diglot.cli.schema", "show"),
}


def _complete(how: str, words: list[str]) -> int:
    from diglot.cli import completion

    if how == "--complete":
        print("\n".join(completion.candidates(words, {name: module for name, (module, _) in COMMANDS.items()})))
        return 0
    function, rc = completion.of_shell(os.environ)
    print(function.rstrip() if how == "--show-completion" else completion.install(function, rc))
    return 0


def _run(command: str, arguments: list[str]) -> int:
    if command == "train":
        from diglot.cli.parsing import parse_train

        values = parse_train(arguments)
        from diglot.cli.early import check_early
        from diglot.cli.screen import show_phases
        from diglot.phases import LOADING, phase

        check_early(values)
        show_phases()
        with phase(LOADING):
            from diglot.cli.train import train
        return train(values)
    if command in COMMANDS:
        module, function = COMMANDS[command]
        return int(getattr(import_module(module), function)(arguments))
    if command in ("--complete", "--show-completion", "--install-completion"):
        return _complete(command, arguments)
    known = ", ".join(["train", *COMMANDS])
    print(fitted(f"diglot: there is no command {command!r}; commands: {known}"), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
