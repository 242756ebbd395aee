"""The report in a real, headless Chromium: it renders, the hover works, nothing is loaded, nothing runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import browser
from support.made_runs import make_run

from diglot.report.page import page
from diglot.report.runs import load_run

pytestmark = pytest.mark.real

SIZES = {"desktop": (1280, 900), "phone": (360, 740)}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = browser.find()
    if path is None:
        pytest.fail("There is no Chromium. Run `make test-real` or python tests/support/browser.py, which install one.")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module", params=["one", "two"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    folders = [make_run(root / "first")] + ([make_run(root / "second", 0.05)] if request.param == "two" else [])
    (root / "report.html").write_text(page([load_run(folder) for folder in folders]), encoding="utf-8")
    return root / "report.html"


class Opened:
    """A page, and all that it said or asked for."""

    def __init__(self, chromium: Any, file: Path, size: str = "desktop", **options: Any) -> None:
        width, height = SIZES[size]
        self.width = width
        self.context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        self.page = self.context.new_page()
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_load_state("networkidle")

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("javascript", [True, False])
def test_the_page_opens_quietly_and_fits(chromium: Any, file: Path, scheme: str, size: str, javascript: bool) -> None:
    """No message, no request but the file itself, no sideways scrolling, every picture has a size."""
    with Opened(chromium, file, size, color_scheme=scheme, java_script_enabled=javascript) as opened:
        assert opened.messages == [] and opened.requests == [file.as_uri()]
        boxes = [one.bounding_box() for one in opened.page.locator("figure svg").all()]
        assert len(boxes) == 8 and all(box["width"] > 200 and box["height"] > 100 for box in boxes)
        assert all(box["x"] >= 0 and box["x"] + box["width"] <= opened.width for box in boxes)
        if javascript:
            assert opened.page.evaluate("document.documentElement.scrollWidth") <= opened.width
            assert opened.page.title() != "owned"
        assert len(opened.page.screenshot()) > 10_000


@pytest.mark.parametrize("size", SIZES)
def test_pointing_at_a_chunk_shows_both_sides(chromium: Any, file: Path, size: str) -> None:
    with Opened(chromium, file, size) as opened:
        chunk = opened.page.locator("#gap .pair .chunk", has_text="because").first
        tip = chunk.locator(".tip")
        assert not tip.is_visible()
        chunk.scroll_into_view_if_needed()
        chunk.hover(position={"x": 4, "y": 8})
        assert tip.is_visible()
        text = tip.inner_text()
        assert "student" in text and "teacher" in text and "−2.00" in text and "41%" in text and "62%" in text
        box = tip.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= opened.width
        opened.page.mouse.move(0, 0)
        assert not tip.is_visible()


def test_the_keyboard_reaches_a_chunk(chromium: Any, file: Path) -> None:
    with Opened(chromium, file) as opened:
        first = opened.page.locator("#gap .pair .chunk").first
        first.focus()
        assert first.locator(".tip").is_visible()
        opened.page.keyboard.press("Tab")
        assert not first.locator(".tip").is_visible()
        assert opened.page.locator("#gap .pair .chunk").nth(1).locator(".tip").is_visible()


def test_a_tap_shows_a_chunk_on_a_phone(chromium: Any, file: Path) -> None:
    with Opened(chromium, file, "phone", has_touch=True, is_mobile=True) as opened:
        chunk = opened.page.locator("#gap .pair .chunk").nth(1)
        chunk.scroll_into_view_if_needed()
        chunk.tap()
        assert chunk.locator(".tip").is_visible()


def test_dark_and_light_differ_and_chunks_have_the_colours_of_their_gap(chromium: Any, file: Path) -> None:
    results = {}
    for scheme in ("light", "dark"):
        with Opened(chromium, file, color_scheme=scheme) as opened:
            colour = "e => getComputedStyle(e).backgroundColor"
            spans = [opened.page.locator(f"#gap .pair .chunk.{css}").first for css in ("g1", "m5")]
            line = opened.page.locator("figure svg path[style*='--run-0']").first
            stroke = line.evaluate("e => getComputedStyle(e).stroke")
            body = opened.page.locator("body").evaluate(colour)
            results[scheme] = [body, stroke, *(span.evaluate(colour) for span in spans)]
    assert all(a != b for a, b in zip(results["light"], results["dark"], strict=True))
    assert len(set(results["light"])) == 4 and "rgba(0, 0, 0, 0)" not in results["light"]
