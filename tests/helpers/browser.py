"""A page of `bi-compile report` in headless Chromium. It is Debian's (`apt-get install chromium`), not one that Playwright downloads."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")


@contextlib.contextmanager
def opened(page: Path) -> Iterator[Any]:
    """Playwright's page, without a network; an error in the page's scripts fails the test."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            context = browser.new_context(viewport={"width": 1280, "height": 800}, offline=True)
            tab = context.new_page()
            errors: list[str] = []
            tab.on("pageerror", lambda error: errors.append(str(error)))
            tab.on("request", lambda r: errors.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
            tab.goto(page.as_uri())
            tab.wait_for_selector("html[data-ready]", timeout=60_000)
            yield tab
            assert not errors, errors
        finally:
            browser.close()


def search(tab: Any, text: str) -> int:
    """Type into the search; how many nodes are found."""
    tab.keyboard.press("Escape")
    tab.keyboard.press("/")
    tab.keyboard.type(text)
    return int(tab.inner_text("#found").split()[0].replace(",", ""))


def read_and_search(page: Path, operator: str, by: str, file: str) -> None:
    """What every report must show: the verdict, what was replaced by what, a node with its line and neighbours, both sides."""
    with opened(page) as tab:
        assert tab.inner_text("#verdict") == "Batch-invariant"
        overview = tab.inner_text("main")
        assert operator in overview and by in overview
        tab.click("[data-view=nodes]")
        everything = int(tab.inner_text("#found").split()[0].replace(",", ""))
        found = search(tab, operator)
        assert 0 < found < everything
        tab.select_option("[data-filter=verdict]", "taken out")
        tab.click("#list .row >> nth=0")
        shown = tab.inner_text("#detail")
        assert by in shown and "stride" in shown and "shape" in shown and file in shown, shown
        assert tab.locator("#source .here").count() == 1 and tab.inner_text("#source .here").strip().strip("0123456789")
        neighbours = tab.locator("#picture g.node")
        assert neighbours.count() > 1
        tab.click("[data-hops='2']")
        assert tab.locator("#picture g.node").count() >= 2
        other = tab.locator("#picture g.node:not(.me)").first
        name = other.get_attribute("data-node")
        other.click()
        assert tab.inner_text("#detail h2") == name
        tab.click("[data-view=changes]")
        tab.keyboard.press("n")
        tab.wait_for_selector("#pairs .cut, #pairs .add")
        assert "1 of" in tab.inner_text("#changes")
        tab.click("[data-view=certificate]")
        assert "torch" in tab.inner_text("main")
        theme = tab.get_attribute("html", "data-theme")
        tab.keyboard.press("t")
        assert tab.get_attribute("html", "data-theme") != theme
