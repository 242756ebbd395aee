"""What the site is made of: its list of pages, the pages that are made when it is built, its pictures and papers."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import pictures
import pytest
import support.tokenizers_zoo as zoo
import yaml

import diglot
from diglot.cli.options import load_options
from diglot.inspection import align_text
from diglot.objectives import OBJECTIVES
from diglot.trainers import GKDTrainer, MiniLLMTrainer
from diglot.vocabulary import ByteEncoder, Vocabulary

hooks = pytest.importorskip("hooks", reason="needs mkdocs: pip install 'diglot[docs]'")
ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
SVG = "{http://www.w3.org/2000/svg}"
ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")


def nav() -> list[object]:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    return yaml.safe_load(text[text.index("\nnav:") :])["nav"]


def test_every_page_that_the_site_lists_exists_or_is_made() -> None:
    made = {*hooks.OF_ROOT.values(), "options.md"}
    listed = list(hooks._pages(nav()))
    assert len(listed) == len(set(listed)) >= 15
    assert all((DOCS / page).exists() != (page in made) for page in listed)


def test_the_page_of_options_has_every_option_with_its_help() -> None:
    page = hooks.options()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.M))
    assert rows.keys() == load_options().keys()
    assert "Share of steps on the student's own completions" in rows["lmbda"] and "`0.5` | gkd |" in rows["lmbda"]


def entries_of(pages: str) -> list[str]:
    texts = [path.read_text(encoding="utf-8") for path in DOCS.glob(pages)]
    return [entry for text in texts for entry in re.findall(r"^::: (diglot\S+)$", text, re.M)]


def test_the_first_page_of_the_reference_is_what_can_be_imported_from_diglot_itself() -> None:
    page = (DOCS / "reference.md").read_text(encoding="utf-8")
    whole = {entry.split(".")[-1] for entry in entries_of("reference.md")}
    assert whole - {"errors", "DistillationTrainer", "DistillationConfig"} == {
        name for name in diglot.__all__ if name.endswith(("Trainer", "Config"))
    }
    others = set(re.findall(r"`(\w+)`", page.split("## Functions and classes")[1].split("## Errors")[0]))
    assert others == set(diglot.__all__) - whole - {"DiglotError"}


def test_the_reference_has_every_objective_and_every_public_package() -> None:
    entries = entries_of("reference*.md")
    assert {f"{one.__module__}.{one.__name__}" for one in OBJECTIVES.values()} <= {*entries}
    public = {
        path.parent.name for path in (ROOT / "src/diglot").glob("*/__init__.py") if "__all__" in path.read_text("utf-8")
    }
    assert {f"diglot.{package}" for package in public - {"trainers"}} <= {*entries}


def test_links_of_the_readme_are_those_of_the_site() -> None:
    page = hooks._from_root("README.md")
    assert "](docs/" not in page and "](objectives.md)" in page
    assert hooks.on_page_markdown("[a](../README.md#b)") == "[a](index.md#b)"


def encoder(tokenizer: object) -> ByteEncoder:
    return ByteEncoder(tokenizer, Vocabulary.from_tokenizer(tokenizer))


@pytest.mark.parametrize("text", ["The river, 12345 & <b>", "naïve 数学 👩", "e\u0301 ﬁne", ""])
def test_a_picture_shows_every_token_of_both_sides_once(text: str) -> None:
    spans = align_text(encoder(zoo.chatml()), encoder(zoo.unigram_nfkc()), text)
    root = ElementTree.fromstring(pictures.draw(spans))
    boxes = [
        (b.get("y"), b.get("fill"), float(b.get("x", 0)), float(b.get("width", 0))) for b in root.iter(SVG + "rect")
    ]
    colours = {y: [fill for at, fill, _, _ in boxes[1:] if at == y] for y in ("12", "76")}
    for y, side in (("12", "student"), ("76", "teacher")):
        expected = [
            (pictures.RED if not s.exact else pictures.GREEN if s.one_to_one else pictures.AMBER)[0]
            for s in spans
            for _ in getattr(s, side)
        ]
        assert colours[y] == expected
        row = [(x, width) for at, _, x, width in boxes[1:] if at == y]
        assert all(x + width < following for (x, width), (following, _) in pairwise(row))
    assert [t.text for t in root.iter(SVG + "text")][-1] == pictures.summary(spans)


def test_the_pages_show_all_pictures_and_no_other() -> None:
    shown = {
        name for page in DOCS.glob("*.md") for name in re.findall(r"\(pictures/(\w+)\.svg\)", page.read_text("utf-8"))
    }
    assert shown == {path.stem for path in pictures.PICTURES.glob("*")} == {one.name for one in pictures.DRAWN}


def test_the_paper_index_has_every_objective_every_trainer_and_every_paper_that_the_sources_name() -> None:
    page = (DOCS / "papers.md").read_text(encoding="utf-8")
    first = " ".join(re.findall(r"^\| (.+?) \|", page, re.M))
    assert {*re.findall(r"`(\w+)`", first)} == {
        *OBJECTIVES,
        GKDTrainer.__name__,
        MiniLLMTrainer.__name__,
        "reference_alpha",
    }
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    assert {*ARXIV.findall(page)} == {*re.findall(r"(?:arXiv |, \")(\d{4}\.\d{5})\b", sources)}
    assert all(f"[{one}](https://arxiv.org/abs/{one})" in page for one in ARXIV.findall(page))


def test_equations_and_sections_in_the_paper_index_are_those_of_the_docstrings() -> None:
    page = (DOCS / "papers.md").read_text(encoding="utf-8")
    places = re.findall(r"(?:eq\.|section) [\d.]+\d|(?:eq\.|section) \d", page)
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    assert len(places) >= 5 and all(place in sources for place in places)
