"""The list of all pairs in a real browser: filters, order, a pair opened by mouse, key and address, and on paper."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe

from report_browser import Seen, chromium, needs_chromium
from report_runs import HOSTILE, judged, make_run, pair
from sp2dpo.evidence import read_evidence
from sp2dpo.report.build import build_report
from sp2dpo.report.pipeline import pipeline_of, worked
from sp2dpo.rubric import CATEGORIES
from sp2dpo.runs import Run
from test_explorer import SETTINGS, noise, small

pytestmark = needs_chromium

N = 130

WORKED = ("weighted prompts", "weighted annotators", "huber", "exponential damping", "rational damping")
WORKED += ("debiased", "pooled", "envelopes")
"""Settings that the script of the page has code of its own for."""


def answer(n: int, annotator: str, variant: str) -> str:
    """Every category; every tenth pair is doubted by both; pair 7 lacks an answer."""
    if (n, annotator, variant) == (7, "a", "v2"):
        return ""
    confidence = 0.2 if n % 10 == 0 else 0.9
    return judged(CATEGORIES[n % 6], ((n * 37 + int(variant[1]) * 5 * (n % 3)) % 100) / 100, confidence)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Hostile pairs, of which every 40th is known to be reversed; the last has the texts of the first."""
    rows = [pair(n, HOSTILE if n < 3 else "", wrong=n % 40 == 0) for n in range(N - 1)]
    rows.append(rows[0] | {"prompt_id": "again"})
    names = {"annotators": ("a", "b"), "known_reversed": "wrong", "schedule": {"min_calls": 5}}
    made = make_run(tmp_path_factory.mktemp("explorer"), rows, answer, **names)
    build_report(made.path)
    return made


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A run for each way to make β."""
    runs = {
        name: small(tmp_path_factory.mktemp("how"), schedule=one) for name, one in SETTINGS.items() if name in WORKED
    }
    for one in runs.values():
        build_report(one.path)
    return runs


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose report has excerpts."""
    rows = [pair(n, noise(n)) for n in range(1000)]
    made = make_run(tmp_path_factory.mktemp("cut"), rows, answer, annotators=("b",), variants=("v1",))
    build_report(made.path, 3)
    return made


@pytest.fixture(scope="module")
def browser(run: Run, settled: dict[str, Run], cut: Run) -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture
def page(browser: Any, run: Run) -> Iterator[Any]:
    """The report, open; at the end it has asked for nothing and complained of nothing."""
    seen = Seen(browser, run.report.as_uri(), 1366)
    seen.page.locator("#explorer").wait_for()
    yield seen.page
    assert seen.complaints == []
    assert {url.partition("#")[0] for url in seen.requests} == {run.report.as_uri()}
    seen.page.close()


def names(page: Any) -> list[str]:
    """Of the rows that are shown."""
    shown: list[str] = page.locator("#list-rows a").all_text_contents()
    return shown


def cells(page: Any, column: int) -> list[str]:
    shown: list[str] = page.locator(f"#list-rows tr > :nth-child({column})").all_text_contents()
    return shown


def matching(page: Any, n: int) -> None:
    """Wait until so many pairs match."""
    told = re.compile(f"^All {n} pairs" if n == N else f"^{n} of {N} pairs match")
    page.locator("#count", has_text=told).wait_for(timeout=5000)


def opened(page: Any) -> str:
    page.locator("#trail[open]").wait_for()
    return str(page.locator("#trail-name").text_content())


def test_the_list_shows_every_pair_on_pages_of_fifty(page: Any) -> None:
    matching(page, N)
    seen = names(page)
    assert len(seen) == 50
    for expected in ("Page 2 of 3", "Page 3 of 3"):
        page.get_by_role("button", name="Next", exact=True).click()
        assert page.locator("#page").text_content() == expected
        seen += names(page)
    assert page.get_by_role("button", name="Last").is_disabled()
    assert seen == [*(f"p{n}" for n in range(N - 1)), "again"]
    page.get_by_role("button", name="First").click()
    assert names(page)[0] == "p0"


def test_numbers_of_the_list_are_those_of_the_schedule(page: Any, run: Run) -> None:
    evidence = read_evidence(run)
    assert cells(page, 2) == evidence.category_i[:50].tolist()
    assert cells(page, 3) == [f"{beta:.4f}" for beta in evidence.beta_i[:50]]
    assert cells(page, 5) == [f"{spread:.3f}" for spread in evidence.spread_i[:50]]
    assert cells(page, 6)[:2] == ["100% !", "0%"]


def test_filters_narrow_the_list_together_and_reset_takes_them_back(page: Any, run: Run) -> None:
    evidence = read_evidence(run)
    page.get_by_role("checkbox", name="Safety").uncheck()
    kept = evidence.category_i != "Safety"
    matching(page, kept.sum())
    page.get_by_label("β from").fill("0.1")
    page.get_by_label("to", exact=True).fill("0.2")
    kept &= (evidence.beta_i >= 0.1) & (evidence.beta_i <= 0.2)
    matching(page, kept.sum())
    page.get_by_label("Disagreement at least").fill("0.05")
    kept &= evidence.spread_i >= 0.05
    matching(page, kept.sum())
    assert 0 < kept.sum() < 50
    assert names(page) == [f"p{n}" for n in np.flatnonzero(kept)]
    page.get_by_role("button", name="Show all pairs").click()
    matching(page, N)


def test_likely_label_errors_and_reversed_pairs_are_one_click_away(page: Any) -> None:
    page.locator("dl.short a[data-show=f-errors]").click()
    matching(page, 14)
    assert set(names(page)) == {*(f"p{n}" for n in range(0, N - 1, 10)), "again"}
    assert page.locator("#list th[aria-sort=descending]").text_content() == "Doubt"
    page.locator("dl.short a[data-show=f-reversed]").click()
    matching(page, 5)
    assert set(names(page)) == {"p0", "p40", "p80", "p120", "again"}


def test_the_search_finds_ids_beginnings_and_whole_hashes(page: Any, run: Run) -> None:
    whole = read_evidence(run).pair_ids[17]
    for text, found in {"p17": ["p17"], "question 17": ["p17"], whole: ["p17"], whole[:12].upper(): ["p17"]}.items():
        page.locator("#f-text").fill(text)
        matching(page, 1)
        assert names(page) == found
    page.locator("#f-text").fill("nowhere")
    matching(page, 0)
    assert names(page) == []


def test_every_column_sorts_both_ways_and_says_so(page: Any, run: Run) -> None:
    evidence = read_evidence(run)
    for column, values in {"β": evidence.beta_i, "Gap": evidence.gap_i, "Disagreement": evidence.spread_i}.items():
        button = page.get_by_role("button", name=column, exact=True)
        for _ in range(2):
            button.click()
            down = page.locator("#list th", has=button).get_attribute("aria-sort") == "descending"
            place = {"β": 3, "Gap": 4, "Disagreement": 5}[column]
            expected = np.sort(values)[::-1] if down else np.sort(values)
            assert [float(cell) for cell in cells(page, place)] == pytest.approx(expected[:50], abs=5e-4)
    page.get_by_role("button", name="Pair", exact=True).click()
    assert names(page) == sorted([*(f"p{n}" for n in range(N - 1)), "again"])[:50]
    assert page.locator("#list thead th:not([aria-sort=none])").count() == 1
    page.get_by_role("button", name="Category", exact=True).click()
    assert set(cells(page, 2)) <= {"Safety", "Factuality", "Instruction"}
    page.get_by_role("button", name="Prompt begins").click()
    assert cells(page, 7) == sorted(cells(page, 7))


def test_the_keyboard_opens_a_pair_and_escape_returns_to_its_row(page: Any) -> None:
    page.locator("#list-rows a").nth(4).focus()
    page.keyboard.press("Enter")
    assert opened(page) == "p4"
    assert re.search(r"#pair=[0-9a-f]{12}$", page.url)
    for _ in range(12):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement === document.body || !!document.activeElement.closest('#trail')")
    page.keyboard.press("Escape")
    page.locator("#trail:not([open])").wait_for(state="attached")
    page.wait_for_url(lambda url: "#pair=" not in url)
    assert page.evaluate("document.activeElement.textContent") == "p4"


def test_a_click_anywhere_on_the_row_opens_it_and_back_closes_it(page: Any) -> None:
    page.locator("#list-rows tr").nth(9).locator("td").nth(2).click()
    assert opened(page) == "p9"
    page.go_back()
    page.locator("#trail:not([open])").wait_for(state="attached")
    page.go_forward()
    assert opened(page) == "p9"


def test_next_and_previous_walk_through_what_matches(page: Any) -> None:
    page.locator("dl.short a[data-show=f-errors]").click()
    matching(page, 14)
    listed = names(page)
    page.locator("#list-rows a").first.click()
    assert opened(page) == listed[0]
    assert page.get_by_role("button", name="Previous").is_disabled()
    page.locator("#trail-next").click()
    page.locator("#trail-name", has_text=re.compile(f"^{listed[1]}$")).wait_for()
    assert page.locator("#trail-place").text_content() == "2 of 14"
    page.get_by_role("button", name="Close").click()
    page.wait_for_url(lambda url: "#pair=" not in url)


def test_an_address_opens_its_pair_also_the_second_of_the_same_texts(browser: Any, run: Run) -> None:
    ids = read_evidence(run).pair_ids
    for address, name in {ids[5]: "p5", ids[5][:12]: "p5", ids[0][:12]: "p0", f"{ids[0][:12]}.2": "again"}.items():
        seen = Seen(browser, f"{run.report.as_uri()}#pair={address}", 1366)
        assert opened(seen.page) == name
        seen.page.keyboard.press("Escape")
        seen.page.wait_for_url(lambda url: url.endswith("#pairs"))
        assert seen.complaints == []
        seen.page.close()
    seen = Seen(browser, f"{run.report.as_uri()}#pair=ffffffffffff", 1366)
    seen.page.locator("#count", has_text="There is no pair ffffffffffff in this schedule.").wait_for()
    assert not seen.page.locator("#trail").is_visible()
    seen.page.close()


def test_an_open_pair_shows_all_of_its_texts_and_judgements(page: Any, run: Run) -> None:
    evidence = read_evidence(run)
    page.locator("#list-rows a").nth(7).click()
    assert opened(page) == "p7"
    texts = page.locator("#trail .text").all_text_contents()
    assert [one.strip() for one in texts] == ["Question 7", "Good answer 7", "Bad answer 7"]
    rows = [one.locator("th, td").all_text_contents() for one in page.locator("#trail table").first.locator("tr").all()]
    assert len(rows) == 1 + 6
    assert rows[2] == ["a", "v2", *["no answer"] * 5, "not_recorded, attempt 1"]
    gap, beta = evidence.gap_ijk[7, 1, 2], evidence.schedule["beta_b_v3"][7].as_py()
    assert rows[6][:2] == ["b", "v3"]
    assert rows[6][5:] == [f"{gap:.4f}", f"{beta:.4f}", ""]
    own = page.locator("#trail .own dd").all_text_contents()
    assert own[:2] == [evidence.pair_ids[7], "p7"]
    assert "false" in own


def test_hostile_texts_of_an_open_pair_stay_texts(page: Any) -> None:
    page.locator("#list-rows a").first.click()
    assert opened(page) == "p0"
    assert "</script><script>alert(1)</script>" in page.locator("#trail .text").nth(1).text_content()
    assert page.locator("#trail img, #trail script, #trail style, #trail details").count() == 0
    assert page.evaluate("document.querySelector('#trail').scrollWidth <= document.querySelector('#trail').clientWidth")


@pytest.mark.parametrize("name", WORKED)
def test_the_page_works_beta_out_as_the_report_does(browser: Any, settled: dict[str, Run], name: str) -> None:
    run = settled[name]
    evidence = read_evidence(run)
    pipeline = pipeline_of(evidence)
    seen = Seen(browser, run.report.as_uri(), 1366)
    for i in (0, 3, 5):
        seen.page.goto(f"{run.report.as_uri()}#pair={evidence.pair_ids[i]}")
        seen.page.locator("#trail-name", has_text=f"p{i}").wait_for()
        said = seen.page.locator("#trail .formulas").evaluate("e => [...e.children].map(c => c.textContent)")
        expected = [text for step in worked(evidence, pipeline, i) for text in (step.title, *step.lines)]
        assert [one for one in said if not is_rounding(one, expected)] == []
        assert len(said) == len(expected)
    assert seen.complaints == []
    seen.page.close()


def is_rounding(line: str, expected: list[str]) -> bool:
    """Whether a line is there, each number within one of its last decimal: browsers round a 5 up, Python to even."""
    numbers, words = re.findall(r"\d\.\d{4}", line), re.sub(r"\d\.\d{4}", "#", line)
    return any(
        words == re.sub(r"\d\.\d{4}", "#", one)
        and np.allclose([float(x) for x in numbers], [float(x) for x in re.findall(r"\d\.\d{4}", one)], atol=1.01e-4)
        for one in expected
    )


def test_a_text_that_is_cut_says_how_much_is_left_out_and_how_to_see_it(browser: Any, cut: Run) -> None:
    seen = Seen(browser, cut.report.as_uri(), 1366)
    seen.page.locator("#policy").wait_for()
    told = seen.page.locator("#policy").text_content()
    whole = int(re.findall("the texts of ([0-9]+) of 1,000 pairs are whole", told)[0])
    assert 0 < whole < 1000
    command = re.findall(r"sp2dpo report RUN_DIR --max-mb \d+", told)
    assert len(command) == 1
    seen.page.locator("#pager [data-go=last]").click()
    seen.page.locator("#list-rows a").nth(8).click()
    opened(seen.page)
    note = seen.page.locator("#trail .side.chosen .role").text_content()
    assert re.match(r"[\d,]+ more characters are not in this file\.", note)
    assert command[0] in note
    assert seen.complaints == []
    seen.page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1366])
def test_axe_finds_nothing_with_the_list_and_with_a_pair_open(browser: Any, run: Run, scheme: str, width: int) -> None:
    seen = Seen(browser, run.report.as_uri(), width, scheme)
    seen.page.locator("#explorer").wait_for()
    for open_one in (False, True):
        if open_one:
            seen.page.locator("#list-rows a").first.click()
            opened(seen.page)
        found = Axe().run(seen.page)
        assert found.violations_count == 0, found.generate_report()
        assert seen.page.evaluate("document.documentElement.scrollWidth") == width
    seen.page.close()


def test_on_paper_there_is_no_list_but_everything_else(page: Any) -> None:
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.locator("#explorer").is_visible()
    assert page.get_by_text("On paper there is no list of all pairs").is_visible()
    assert page.locator("#provenance").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_an_open_pair_is_printed_alone(page: Any) -> None:
    page.locator("#list-rows a").nth(4).click()
    opened(page)
    page.emulate_media(media="print")
    assert page.locator("#trail-body").is_visible()
    assert not page.locator("#rows, #short, #trail-close").first.is_visible()
    page.emulate_media(media="screen")


def test_without_scripts_all_other_sections_are_there_and_the_list_says_why_not(browser: Any, run: Run) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(run.report.as_uri())
    assert page.locator("#explorer-off").is_visible()
    assert not page.locator("#explorer").is_visible()
    assert page.locator("h2:visible").count() == 12
    context.close()
