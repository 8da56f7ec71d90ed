"""A browser for the tests of pages, and what an open page asked for, complained of or popped up."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright import sync_api

CHROMIUM = shutil.which("chromium")
FLAGS = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
FLAGS += ("disable-component-update", "disable-sync")

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="no chromium on the PATH: apt-get install chromium"
)


@contextmanager
def chromium() -> Iterator[Any]:
    """To be started after all pages are made, because playwright's own event loop keeps running in this thread."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[f"--{flag}" for flag in FLAGS])
        yield browser
        browser.close()


def folded(page: Any) -> dict[str, list[Any]]:
    """By caption, each table that folds: how far it reaches out of its box, and names of its cells beside its heads."""
    found = page.evaluate(
        """() => [...document.querySelectorAll('table.fold')].map((table) => [table.caption.textContent, [
        table.parentElement.scrollWidth - table.parentElement.clientWidth,
        [...table.querySelectorAll('tbody tr')].flatMap((row) => [...row.cells].map((cell, n) => [
        cell.dataset.name ?? null, table.tHead.rows[0].cells[n].textContent, cell.classList.contains('words')]))]])"""
    )
    return dict(found)


class Seen:
    """An open page, and what it asked for, complained of or popped up."""

    def __init__(self, browser: Any, url: str, width: int, scheme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
        self.page.set_default_timeout(15_000)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", self.refuse)
        self.page.goto(url)
        self.page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")

    def check(self, url: str, width: int, part: str | None = None) -> None:
        """Nothing else asked for, no complaint, no scrolling sideways, and nothing that axe finds in a part of it."""
        assert self.requests == [url]
        assert self.complaints == []
        assert self.page.evaluate("document.documentElement.scrollWidth") == width
        found = Axe().run(self.page, context=part)
        assert found.response["violations"] == [], found.generate_report()
        self.page.close()

    def refuse(self, dialog: Any) -> None:
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()
