"""Completion in bash and zsh: commands, options and their values, without torch."""

from __future__ import annotations

import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diglot.cli.completion import BASH, ZSH
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


# In zsh completion runs in the line editor alone: a key writes what the line has become.
ZSHRC = """
show() {{ print -r -- "<$BUFFER>" }}
zle -N show
bindkey '^X' show
diglot() {{ {python} -m diglot.cli.main "$@" }}
PROMPT='ready '
"""


def typed(keys: str, home: Path) -> str:
    """The line after `keys` were typed in an interactive zsh whose start file has the function."""
    environment = {**os.environ, "HOME": str(home), "TERM": "dumb", "SHELL": "/usr/bin/zsh"}
    environment.pop("ZDOTDIR", None)
    terminal, slave = pty.openpty()
    with subprocess.Popen(
        ["zsh", "-i"], stdin=slave, stdout=slave, stderr=slave, cwd=home, env=environment, start_new_session=True
    ) as zsh:
        os.close(slave)
        seen, sent, end = "", False, time.monotonic() + 60
        while not (result := re.search(r"<(diglot.*?)>", seen)):
            assert time.monotonic() < end, seen
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 4096).decode()
            if not sent and "ready " in seen:
                os.write(terminal, f"{keys}\x18".encode())
                sent = True
        zsh.kill()
    os.close(terminal)
    return result[1]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
@pytest.mark.parametrize(("keys", "line"), [
    ("diglot tr\t", "diglot train "),
    ("diglot train --learning\t", "diglot train --learning_rate "),
    ("diglot train --trainer m\t", "diglot train --trainer minillm "),
    ("diglot train --trainer=m\t", "diglot train --trainer=minillm "),
    ("diglot train --bf16 t\t", "diglot train --bf16 true "),
    ("diglot train --dataset_name my\t", "diglot train --dataset_name my_rows.jsonl "),
    ("diglot recipes s\t", "diglot recipes show "),
])  # fmt: skip
def test_zsh_completes_commands_options_values_and_files(
    keys: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".zshrc").write_text(ZSHRC.format(python=shlex.quote(sys.executable)), encoding="utf-8")
    (tmp_path / "my_rows.jsonl").touch()
    for name, value in (("HOME", str(tmp_path)), ("SHELL", "/usr/bin/zsh")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("ZDOTDIR", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(os.path.abspath(part) for part in sys.path if part))
    assert main(["--install-completion"]) == 0
    assert typed(keys, tmp_path) == line


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


@pytest.mark.parametrize(("shell", "zdotdir", "name", "function"), [
    ("/bin/bash", None, ".bashrc", BASH),
    (None, None, ".bashrc", BASH),
    ("/usr/bin/zsh", None, ".zshrc", ZSH),
    ("/usr/bin/zsh", "elsewhere", "elsewhere/.zshrc", ZSH),
])  # fmt: skip
def test_it_is_installed_once_and_leaves_what_is_there(
    shell: str | None,
    zdotdir: str | None,
    name: str,
    function: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    environment = {"HOME": str(tmp_path), "SHELL": shell, "ZDOTDIR": zdotdir and str(tmp_path / zdotdir)}
    for variable, value in environment.items():
        monkeypatch.delenv(variable, raising=False) if value is None else monkeypatch.setenv(variable, value)
    rc = tmp_path / name
    rc.parent.mkdir(exist_ok=True)
    rc.write_text("alias l=ls", encoding="utf-8")
    assert main(["--install-completion"]) == 0
    written = rc.read_text(encoding="utf-8")
    assert written.startswith("alias l=ls\n") and function in written and "source" in capsys.readouterr().out
    assert main(["--install-completion"]) == 0 and "already" in capsys.readouterr().out
    assert rc.read_text(encoding="utf-8") == written
    assert main(["--show-completion"]) == 0 and capsys.readouterr().out == function


@pytest.mark.parametrize("how", ["--install-completion", "--show-completion"])
def test_a_shell_that_is_not_known_is_refused_in_one_line(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", "/usr/bin/fish")
    assert main([how]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("diglot: Completion is known for bash and zsh, and SHELL says fish.")
    assert output.err.count("\n") == 1 and not output.out and not list(tmp_path.iterdir())
