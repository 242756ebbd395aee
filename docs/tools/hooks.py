"""Hooks of the documentation's build: pages that are made from what exists already, so that nothing is said twice."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
OF_ROOT = {  # file -> page of the site
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
OPTIONS = ROOT / "src" / "diglot" / "cli" / "options.json"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Pages that `nav` does not name are listed at its end, so that none is out of reach."""
    named = set(_pages(config.nav))
    missing = sorted(page.name for page in Path(config.docs_dir).glob("*.md") if page.name not in named)
    if missing and config.nav is not None:
        config.nav = [*config.nav, {"More": missing}]
    return config


def _pages(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from _pages(part)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The README is the first page, others of the repository's root the last; the options are the command line's."""
    made = {page: _from_root(name) for name, page in OF_ROOT.items()}
    for name, text in {**made, "options.md": options()}.items():
        files.append(File.generated(config, name, content=text))
    return files


def _from_root(name: str) -> str:
    """A page of the repository's root, with its links as seen from the folder of the documentation."""
    return _to_site((ROOT / name).read_text(encoding="utf-8").replace("](docs/", "]("))


def _to_site(text: str) -> str:
    """Links to pages of the repository's root as links to the pages that are made of them."""
    return re.sub(r"\]\((?:\.\./)?([A-Z]+\.md)", lambda match: f"]({OF_ROOT.get(match[1], match[1])}", text)


def options() -> str:
    """Every option of `diglot train`, by heading, from the schema that `--help` shows."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for option in json.loads(OPTIONS.read_text(encoding="utf-8")):
        groups[option["group"]].append(option)
    parts = [
        "# Options\n\nOn the command line, in recipes, and as fields of `GKDConfig` and `MiniLLMConfig`. Options of a "
        "single objective stand in its entry of `objective`; they are arguments of its class in the "
        "[reference](reference-objectives.md).\n"
    ]
    for group, rows in groups.items():
        parts.append(f"\n## {group}\n\n| option | default | trainer | |\n| --- | --- | --- | --- |\n")
        parts.extend(_row(option) for option in rows)
    return "".join(parts)


def _row(option: dict[str, Any]) -> str:
    choices = f" One of {', '.join(f'`{choice}`' for choice in option['choices'])}." if option["choices"] else ""
    text = (option["help"] + choices).replace("|", "\\|").replace("%%", "%")
    default = "" if option["default"] is None else f"`{json.dumps(option['default'])}`"
    return f"| `{option['name']}` | {default} | {', '.join(option['trainers'])} | {text} |\n"


def on_page_markdown(markdown: str, **given: Any) -> str:
    """Pages link to the README and its like as they lie in the repository."""
    return _to_site(markdown)
