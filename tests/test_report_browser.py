"""The report in a real browser: it asks the network for nothing, runs nothing, overflows nowhere, and can be read."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from report_browser import Seen, chromium, needs_chromium
from report_runs import HOSTILE, judged, make_run, pair, put_margins
from sp2dpo.report.build import build_report

pytestmark = needs_chromium


def answer(n: int, annotator: str, variant: str) -> str:
    category = ("Safety", "Factuality", "Instruction", "Reasoning", "Helpfulness", "Style")[n % 6]
    return judged(category, (n % 10) / 10, 0.9 if annotator == "a" else 0.5 + int(variant[1]) / 10)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve hostile pairs, three annotators, two trained methods, two pairs known to be reversed."""
    rows = [pair(n, HOSTILE, wrong=n in (3, 8)) for n in range(12)]
    run = make_run(
        tmp_path_factory.mktemp("report"),
        rows,
        answer,
        annotators=("a", "b", "c"),
        methods=("dpo", "sp2dpo"),
        known_reversed="wrong",
    )
    for method in ("dpo", "sp2dpo"):
        put_margins(run, method, [(step, row, step * row / 10) for step in range(6) for row in range(12)])
    return build_report(run.path)


@pytest.fixture(scope="module")
def browser(report: Path) -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.mark.parametrize("width", [390, 1366])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_open_page_asks_for_nothing_and_stays_within_its_width(
    browser: Any, report: Path, width: int, scheme: str
) -> None:
    seen = Seen(browser, report.as_uri(), width, scheme)
    assert seen.requests == [report.as_uri()]
    assert seen.complaints == []
    assert seen.page.evaluate("document.documentElement.scrollWidth") == width
    assert seen.page.evaluate("document.documentElement.scrollHeight") > 5000
    seen.page.close()


def test_a_served_page_asks_its_server_for_nothing_else(browser: Any, report: Path) -> None:
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(report.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        seen = Seen(browser, f"http://127.0.0.1:{server.server_port}/report.html", 1366)
        assert seen.page.title() == "small – SP²DPO run report"
        seen.page.close()
    finally:
        server.shutdown()
        server.server_close()
    assert asked == ["/report.html"]


def test_a_script_that_got_into_the_page_would_not_run(browser: Any, report: Path, tmp_path: Path) -> None:
    """The policy is the second lock: here the first is opened on purpose."""
    broken = tmp_path / "broken.html"
    inserted = (
        "<script>document.title = 'run'</script><img src='http://127.0.0.1:9/x' onerror=\"document.title = 'run'\">"
    )
    broken.write_text(report.read_text(encoding="utf-8").replace("</main>", inserted + "</main>"), encoding="utf-8")
    seen = Seen(browser, broken.as_uri(), 1366)
    assert seen.page.title() != "run"
    assert any("Content Security Policy" in complaint for complaint in seen.complaints)
    seen.page.close()


def test_light_and_dark_differ_in_page_and_charts(browser: Any, report: Path) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        seen = Seen(browser, report.as_uri(), 1366, scheme)
        page = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
        ink = seen.page.eval_on_selector("figure svg text", "e => getComputedStyle(e).fill")
        colours[scheme] = (page, ink)
        seen.page.close()
    assert colours["light"][0] != colours["dark"][0]
    assert colours["light"][1] != colours["dark"][1]


def _contrast_of_all_text() -> str:
    """JavaScript: the lowest contrast (WCAG 2) of any text with the nearest opaque background behind it."""
    return """() => {
      const rgb = text => text.match(/[\\d.]+/g).map(Number);
      const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
        .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
      const behind = e => { for (; e; e = e.parentElement) {
        const c = rgb(getComputedStyle(e).backgroundColor); if (c.length === 3 || c[3] === 1) return c; } };
      let lowest = 21, of = '';
      for (const e of document.querySelectorAll('body *')) {
        if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
        const style = getComputedStyle(e), svg = e.namespaceURI.endsWith('svg');
        const [a, b] = [rgb(svg ? style.fill : style.color), behind(e)].map(light);
        const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (contrast < lowest) { lowest = contrast; of = e.outerHTML.slice(0, 80); }
      }
      return [lowest, of];
    }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_the_contrast_of_wcag_aa(browser: Any, report: Path, scheme: str) -> None:
    seen = Seen(browser, report.as_uri(), 1366, scheme)
    lowest, of = seen.page.evaluate(_contrast_of_all_text())
    assert lowest >= 4.5, of
    seen.page.close()


def test_every_chart_has_its_sentence_and_lies_within_its_figure(browser: Any, report: Path) -> None:
    seen = Seen(browser, report.as_uri(), 390)
    charts = seen.page.eval_on_selector_all(
        "figure",
        "all => all.map(f => [f.querySelector('[role=img]').getAttribute('aria-label'),"
        " f.querySelectorAll('svg').length, f.getBoundingClientRect().right])",
    )
    assert len(charts) > 10
    assert all(len(alt) > 40 and drawn == 1 and right <= 390 for alt, drawn, right in charts)
    assert len({alt for alt, _, _ in charts}) == len(charts)
    seen.page.close()


def test_labels_of_a_chart_do_not_lie_on_each_other(browser: Any, report: Path) -> None:
    seen = Seen(browser, report.as_uri(), 390)
    overlaps = seen.page.evaluate(
        """() => [...document.querySelectorAll('figure svg')].flatMap(svg => {
          const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent.trim(), t.getBoundingClientRect()]);
          return boxes.flatMap(([a, p], n) => boxes.slice(n + 1).filter(([b, q]) =>
            p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 3 && q.top < p.bottom - 3)
            .map(([b]) => a + ' / ' + b)); })"""
    )
    assert overlaps == []
    seen.page.close()


def test_the_keyboard_reaches_contents_tables_and_folded_texts(browser: Any, report: Path) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(report.as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#main"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    assert page.locator(".scroll:not([tabindex='0'])").count() == 0
    folded = page.locator("#reversed ~ details > summary").first
    folded.focus()
    page.keyboard.press("Enter")
    assert page.locator("#reversed ~ details").first.evaluate("e => e.open")
    page.close()


def test_paper_shows_the_folded_texts_too(browser: Any, report: Path) -> None:
    page = browser.new_page(viewport={"width": 1366, "height": 844})
    page.goto(report.as_uri())
    inside = page.locator("#reversed ~ details .pair .what").first
    assert not inside.is_visible()
    page.emulate_media(media="print")
    assert inside.is_visible()
    page.close()
