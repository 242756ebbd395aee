"""Completion in bash: commands, options and their values, without torch."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from diglot.cli.completion import BASH
from diglot.cli.main import COMMANDS, main


def at_tab(line: str) -> list[str]:
    """What bash itself offers at the end of a line, through the function that is installed."""
    words = shlex.split(line.replace("=", " = ")) + ([""] if line.endswith(" ") else [])
    diglot = f'diglot() {{ {shlex.quote(sys.executable)} -m diglot.cli.main "$@"; }}\n'
    quoted = " ".join(map(shlex.quote, words))
    ask = f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _diglot; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run([bash, "-c", diglot + BASH + ask], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(("line", "offered"), [
    ("diglot tr", ["train"]),
    ("diglot train --learning", ["--learning_rate"]),
    ("diglot train --trainer ", ["gkd", "minillm"]),
    ("diglot train --trainer=m", ["minillm"]),
    ("diglot train --bf16 t", ["true"]),
    ("diglot train --dataset_name ", []),  # a file, which bash completes
    ("diglot score --level ", ["logprobs", "top_k", "bytes"]),
    ("diglot recipes s", ["show"]),
    ("diglot nonsense --", []),
])  # fmt: skip
def test_bash_offers_commands_options_and_values(line: str, offered: list[str]) -> None:
    assert at_tab(line) == offered


def test_every_command_and_its_options_are_offered(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--complete", ""])
    commands = capsys.readouterr().out.split()
    assert commands == ["train", *COMMANDS]
    for command in commands:
        main(["--complete", command, "--"])
        assert "--help" in capsys.readouterr().out.split(), command


def test_a_tab_waits_for_no_library() -> None:
    code = (
        "import sys; from diglot.cli.main import COMMANDS, main\n"
        "for one in ['train', *COMMANDS]: main(['--complete', one, '--'])\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_it_is_installed_once_and_leaves_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".bashrc").write_text("alias l=ls", encoding="utf-8")
    assert main(["--install-completion"]) == 0
    written = (tmp_path / ".bashrc").read_text(encoding="utf-8")
    assert written.startswith("alias l=ls\n") and BASH in written and "source" in capsys.readouterr().out
    assert main(["--install-completion"]) == 0 and "already" in capsys.readouterr().out
    assert (tmp_path / ".bashrc").read_text(encoding="utf-8") == written
    assert main(["--show-completion"]) == 0 and capsys.readouterr().out == BASH
