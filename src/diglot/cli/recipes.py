"""`diglot recipes list|show|copy`: tested YAML files for `diglot train --config`, and accelerate's configurations."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from diglot.cli.parsing import Parser
from diglot.errors import ConfigError

_LAUNCH = "accelerate launch -m diglot train ... with --config_file"
EXAMPLE = """example:
  diglot recipes copy minillm my-recipe.yaml
  diglot train --config my-recipe.yaml --output_dir runs/first
"""


def parser() -> Parser:
    """The parser of the command."""
    parser = Parser(prog="diglot recipes", description="Recipes that come with Diglot.", epilog=EXAMPLE)
    actions = parser.add_subparsers(dest="action", metavar="list|show|copy", required=True)
    actions.add_parser("list", help="names, and what each is for")
    show = actions.add_parser("show", help="print one")
    copy = actions.add_parser("copy", help="write one into a file, which must not exist")
    for action in (show, copy):
        action.add_argument("name", metavar="NAME")
    copy.add_argument("target", metavar="FILE", nargs="?", help="default: NAME.yaml here")
    return parser


def recipes(arguments: Sequence[str]) -> int:
    """List, show or copy."""
    options = parser().parse_args(arguments)
    if options.action == "list":
        known, launches = load_recipes(), load_launches()
        width = max(map(len, [*known, *launches]))
        for texts in (known, launches):
            if texts is launches:
                print("\nfor accelerate launch --config_file:")
            for name, text in texts.items():
                print(textwrap.fill(f"{name:<{width}}  {title(text)}", 80, subsequent_indent=" " * (width + 2)))
        return 0
    text = read_recipe(options.name)
    if options.action == "show":
        print(text, end="")
        return 0
    target = Path(options.target or f"{options.name}.yaml")
    if target.exists():
        raise ConfigError(f"{target} exists already. Choose another name, or remove it.")
    target.write_text(text, encoding="utf-8")
    start = "diglot train --config" if options.name.removesuffix(".yaml") in load_recipes() else _LAUNCH
    print(f"{target}: edit it, then {start} {target}")
    return 0


def load_recipes() -> dict[str, str]:
    """Name -> YAML text of every recipe, in order of name."""
    return _texts("recipes")


def load_launches() -> dict[str, str]:
    """Name -> YAML text of every configuration of `accelerate launch`, in order of name. None is a recipe's name."""
    return {f"accelerate-{name}": text for name, text in _texts("configs").items()}


def _texts(folder: str) -> dict[str, str]:
    place = files("diglot").joinpath(folder)
    texts = {f.name: f.read_text(encoding="utf-8") for f in place.iterdir() if f.name.endswith(".yaml")}
    return {name.removesuffix(".yaml"): texts[name] for name in sorted(texts)}


def read_recipe(name: str) -> str:
    """The YAML text of one recipe or configuration. Raises `ConfigError` with all names if there is none of that
    name."""
    known = {**load_recipes(), **load_launches()}
    if name.removesuffix(".yaml") not in known:
        raise ConfigError(f"There is no recipe {name!r}; recipes: {', '.join(known)}.")
    return known[name.removesuffix(".yaml")]


def title(text: str) -> str:
    """The first line of a recipe's header."""
    return text.splitlines()[0].lstrip("# ").strip()
