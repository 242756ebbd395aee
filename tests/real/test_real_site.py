"""The documentation in a real, headless Chromium, opened from the disk: its search works, and nothing is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import browser

pytestmark = pytest.mark.real
ROOT = Path(__file__).resolve().parents[2]


def test_the_search_finds_pages_without_a_server_and_without_a_network(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    subprocess.run(build, check=True, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    path = browser.find()
    if path is None:
        pytest.fail("There is no Chromium. Run `make test-real` or python tests/support/browser.py, which install one.")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = chromium.new_page()
        addresses: list[str] = []
        texts: list[str] = []
        page.on("request", lambda request: addresses.append(request.url))
        page.on("pageerror", lambda error: texts.append(str(error)))
        page.goto((tmp_path / "site" / "index.html").as_uri())
        page.click("input.md-search__input")
        page.keyboard.type("adapter", delay=20)
        page.wait_for_selector(".md-search-result__item")
        titles = page.locator(".md-search-result__item h1").all_inner_texts()
        chromium.close()
    assert any("LoRA" in title for title in titles) and texts == []
    assert addresses and all(address.startswith("file:") for address in addresses)
