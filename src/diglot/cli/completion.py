"""Completion of commands and options in bash and zsh, which ask `diglot --complete WORD ...` at each TAB.

Imports neither torch nor transformers.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path

from diglot.cli.options import load_options
from diglot.errors import ConfigError

BASH = """_diglot() {
    local IFS=$'\\n'
    COMPREPLY=($(diglot --complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _diglot diglot
"""
ZSH = """_diglot() {
    local -a given found
    given=("${(@Q)words[2,CURRENT-1]}")
    [[ $PREFIX == --*=* ]] && given+=("${PREFIX%%=*}" =) && compset -P '*='
    found=(${(f)"$(diglot --complete "${given[@]}" "$PREFIX" 2>/dev/null)"})
    (( $#found )) && compadd -a found || _files
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _diglot diglot
"""
_FIRST = ("--help", "--version", "--install-completion", "--show-completion")


def of_shell(environment: Mapping[str, str]) -> tuple[str, Path]:
    """The function for the shell that `SHELL` names (nothing: bash), and the start file it belongs into.

    Raises:
        ConfigError: a shell that is not known.
    """
    shell = Path(environment.get("SHELL") or "bash").name
    if shell == "bash":
        return BASH, Path("~/.bashrc").expanduser()
    if shell == "zsh":
        return ZSH, Path(environment.get("ZDOTDIR") or "~").expanduser() / ".zshrc"
    raise ConfigError(f"Completion is known for bash and zsh, and SHELL says {shell}. Set SHELL to one of them.")


def install(function: str, rc: Path) -> str:
    """Append the function to a start file, unless it is there; what was done, in words."""
    text = rc.read_text(encoding="utf-8") if rc.exists() else ""
    if function in text:
        return f"{rc} completes diglot already."
    with rc.open("a", encoding="utf-8") as file:
        file.write(f"{'' if text.endswith(chr(10)) or not text else chr(10)}\n# completion of diglot\n{function}")
    return f"Written to {rc}. It works in new shells, and in this one after:\n  source {rc}"


def candidates(words: Sequence[str], modules: Mapping[str, str]) -> list[str]:
    """What the last of `words` may become; nothing where a name or a file is due, which the shell completes itself.

    Args:
        words: those behind `diglot`, up to the cursor; `--option=value` as three.
        modules: of the commands beside `train`, each with a `parser()`.
    """
    *before, word = words or [""]
    if not before:
        return _fitting(["train", *modules, *(_FIRST if word.startswith("-") else ())], word)
    command, *arguments = before
    options, actions = _known(command, modules)
    if word == "=":
        arguments, word = [*arguments, "="], ""
    option = arguments[-2] if len(arguments) > 1 and arguments[-1] == "=" else arguments[-1] if arguments else ""
    if (values := options.get(option)) is not None:
        return _fitting(values, word)
    if word.startswith("-"):
        return _fitting(options, word)
    return _fitting(actions, word) if not arguments else []


def _fitting(words: Iterable[str], start: str) -> list[str]:
    return [word for word in words if word.startswith(start)]


def _known(command: str, modules: Mapping[str, str]) -> tuple[dict[str, tuple[str, ...] | None], list[str]]:
    """Option -> its values (none to choose from: empty; it takes none: None), and the command's own actions."""
    if command in ("train", "estimate"):
        choices: dict[str, tuple[str, ...] | None] = {"--config": (), "--help": None}
        choices |= {"--help-all": None} if command == "train" else {}
        for one in load_options().values():
            choices[f"--{one.name}"] = one.choices or (("true", "false") if "bool" in one.kinds else ())
        return choices, []
    if command not in modules:
        return {}, []
    parser: argparse.ArgumentParser = import_module(modules[command]).parser()
    options: dict[str, tuple[str, ...] | None] = {}
    actions: list[str] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            actions = list(action.choices)
        for name in [one for one in action.option_strings if one.startswith("--")][:1]:
            options[name] = None if action.nargs == 0 else tuple(map(str, action.choices or ()))
    return options, actions
